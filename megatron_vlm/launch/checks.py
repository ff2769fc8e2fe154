"""What must hold before a run starts: each check tells what it found, or what is wrong and what to do.

    packages  model  devices  disk  port --Finding--> Report, printed as they come; one failure stops the start

``devices`` and ``disk`` have a file each.

Nothing here starts a process of the run or touches a GPU: memory is asked of the driver's own tool.
"""

import importlib
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConversionError, MegatronVLMError
from megatron_vlm.files import read_json
from megatron_vlm.packages import DISTRIBUTION, OWN_NAMES, pins, pip_line
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.hf_io import INDEX_NAME, resolve_directory

GIB = 2**30
EXACT = ("torch", "megatron-core", "transformers")
"""Other versions of these compute something else, or not at all."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Outcome of one check; ``advice`` says what to do about a warning or a failure."""

    check: str
    outcome: Literal["ok", "warning", "FAILED"]
    text: str
    advice: str = ""

    def __str__(self) -> str:
        lines = self.text.replace("\n", "\n" + " " * 20)
        return f"{self.outcome:<8} {self.check:<10} {lines}" + (f"\n{'':20}-> {self.advice}" if self.advice else "")


@dataclass
class Report:
    """The findings and notes so far; each is printed as it comes, once: a plan that is made again says the same again."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """What settings come to."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"note     {text}", flush=True)

    def ok(self, check: str, text: str) -> None:
        """Something is as it must be."""
        self._add(Finding(check=check, outcome="ok", text=text))

    def warn(self, check: str, text: str, advice: str) -> None:
        """The run starts all the same."""
        self._add(Finding(check=check, outcome="warning", text=text, advice=advice))

    def fail(self, check: str, text: str, advice: str) -> None:
        """The run does not start."""
        self._add(Finding(check=check, outcome="FAILED", text=text, advice=advice))

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome == "FAILED"]

    def _add(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)
            print(finding, flush=True)


# ---- packages ----


def check_packages(report: Report, asked: Mapping[str, str], wished: Mapping[str, str]) -> None:
    """Checks Python, what every run needs, and what this one asks for.

    Args:
        report: gets the findings.
        asked: package -> the setting that needs it.
        wished: package -> what is left out without it.
    """
    failures = len(report.failed)
    pinned = pins()
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        version = ".".join(map(str, sys.version_info[:3]))
        report.fail("packages", f"Python {version}, but megatron-core has wheels for 3.11 and 3.12", "use one of these")
    for name, (pin, extra) in sorted(pinned.items()):
        needed = not extra or name in asked
        if needed and not _check_package(report, name, pin, asked.get(name, "every run")) and name == "torch":
            return
    for name, why in sorted(asked.items()):
        if name not in pinned:
            _check_package(report, name, None, why)
    for name, what in sorted(wished.items()):
        if name not in asked and not _installed(name):
            pin = pinned.get(name, ("", ""))[0]
            report.warn("packages", f"{name} is not installed: {what}", pip_line(name, pin))
    if len(report.failed) == failures:
        shown = ", ".join(f"{name} {_installed(name)}" for name in (*EXACT, *sorted(asked)))
        report.ok("packages", f"Python {sys.version.split()[0]}, {shown}")


def _check_package(report: Report, name: str, pin: str | None, why: str) -> bool:
    """Whether a package that is needed can be used."""
    version = _installed(name)
    if version is None:
        report.fail("packages", f"{name} is not installed, and {why} needs it", pip_line(name, pin))
        return False
    if pin and version.split("+")[0] != pin:
        text = f"{name} {version} is installed, {DISTRIBUTION} is made for {pin}"
        if name in EXACT and version.split(".")[:2] != pin.split(".")[:2]:
            report.fail("packages", text, pip_line(name, pin))
            return False
        report.warn("packages", text, pip_line(name, pin))
    return True


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    try:
        return str(getattr(importlib.import_module(OWN_NAMES.get(name, name)), "__version__", "?"))
    except ImportError:
        return None


# ---- model ----


def check_model(report: Report, path: str, family: str | None) -> WeightSource | None:
    """Opens what the run starts from: config, every shard of the index, every tensor. The caller closes it."""
    again = "toolkits/download_model.sh HUB_ID DIR fetches what is missing and keeps what is there"
    try:
        directory = resolve_directory(path)
        absent = _absent_shards(directory)
        if absent:
            text = f"{directory}: {len(absent)} shards of {INDEX_NAME} are missing: {', '.join(absent)}"
            report.fail("model", text, again)
            return None
        source = open_source(path, family)
    except (MegatronVLMError, OSError) as error:
        advice = again if "model_name" not in str(error) else ""
        report.fail("model", str(error), advice or "name a model directory, or a hub id")
        return None
    size = sum(info.nbytes for info in source.infos.values())
    report.ok("model", f"{path}: {source.spec.name}, {len(source.infos)} tensors, {size / GIB:.2f} GiB")
    return source


def _absent_shards(directory: Path) -> list[str]:
    index = directory / INDEX_NAME
    if not index.is_file():
        return []
    shards = sorted(set((read_json(index, ConversionError).get("weight_map") or {}).values()))
    return [shard for shard in shards if not (directory / shard).is_file()]


def check_processor(report: Report, source: WeightSource, data: DataConfig) -> Processor | None:
    """Opens tokenizer and image processor as the run will."""
    try:
        processor = source.spec.open_processor(source.hf_dir, data)
    except Exception as error:  # ConfigError, and what tokenizer libraries raise over a missing or damaged file
        text = f"tokenizer or processor of {source.hf_dir} cannot be used: {str(error).strip() or repr(error)}"
        names = "tokenizer.json or tokenizer.model, tokenizer_config.json, preprocessor_config.json ..."
        report.fail(
            "processor", text, f"correct the setting that it names, or copy the model's other files there: {names}"
        )
        return None
    report.ok("processor", f"{type(processor).__name__}, {data.seq_length} tokens a sample at most")
    return processor


# ---- port ----


def check_host(report: Report, need: int, offload: str) -> None:
    """``need``: bytes that ranks of this machine keep in its memory, of what ``parallel.offload`` says."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > 0.9 * have:
        text = f"parallel.offload={offload} takes {need / GIB:.1f} GiB of this machine's memory, which has {have / GIB:.1f}"
        less = "parallel.offload_fraction below 1" if offload == "optimizer" else "fewer ranks a machine"
        report.fail("memory", text, f"more memory or machines, {less}, or --use_lora")


def choose_port(report: Report, wanted: int) -> int:
    """A port that nobody listens on: the wanted one if it is free (0: any)."""
    if wanted and _is_free(wanted):
        report.ok("port", str(wanted))
        return wanted
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    if wanted:
        report.warn("port", f"{wanted} is in use: {port} takes its place", "set --master_port 0 to have any free one")
    else:
        report.ok("port", f"{port}, the first that was free")
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
        return True
