"""What must hold before a run starts: each check tells what it found, or what is wrong and what to do.

    packages  model  devices  disk  port --Finding--> Report, printed as they come; one failure stops the start

Nothing here starts a process of the run or touches a GPU: memory is asked of the driver's own tool.
"""

import importlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError, ConversionError, MegatronVLMError
from megatron_vlm.files import read_json, trial_write
from megatron_vlm.packages import DISTRIBUTION, OWN_NAMES, pins, pip_line
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.hf_io import INDEX_NAME, resolve_directory

GIB = 2**30
EXACT = ("torch", "megatron-core", "transformers")
"""Other versions of these compute something else, or not at all."""
_BF16_CAPABILITY = 8.0
_SLACK_BYTES = 64 << 20  # logs, configs, tokenizer files


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
    """The findings so far; each is printed as it comes."""

    findings: list[Finding] = field(default_factory=list)

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


# ---- devices ----


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What one machine trains on; sizes in bytes of one rank.

    Attributes:
        kind: cpu or cuda.
        ranks: processes to start here.
        names: GPUs in use, as CUDA_VISIBLE_DEVICES names them; empty on the CPU.
        memory: that a rank can have, as free now.
        total: of the device (the machine's share on the CPU).
        text: in words.
    """

    kind: Literal["cpu", "cuda"]
    ranks: int
    names: tuple[str, ...]
    memory: int
    total: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as the driver tells of it; sizes in bytes."""

    index: str
    uuid: str
    name: str
    total: int
    free: int
    capability: float


def list_gpus() -> list[Gpu]:
    """The GPUs of this machine, asked of nvidia-smi; none where it is absent or finds none."""
    fields = "index,uuid,name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        index, uuid, name, total, free, capability = (part.strip() for part in line.split(","))
        sizes = dict(total=int(float(total)) << 20, free=int(float(free)) << 20)
        gpus.append(Gpu(index=index, uuid=uuid, name=name, capability=float(capability), **sizes))
    return gpus


def check_devices(
    report: Report,
    *,
    device: str | None,
    precision: str,
    visible: str | None,
    ranks: int | None,
    single: bool,
    memory_gib: float | None,
) -> Devices | None:
    """Picks the devices of this machine.

    Args:
        report: gets the findings.
        device: ``training.device``; None: GPUs.
        precision: ``training.precision``.
        visible: GPUs to use, as CUDA_VISIBLE_DEVICES names them; None: that variable, else all.
        ranks: processes wished for; None: one a GPU, one on the CPU.
        single: one process.
        memory_gib: memory of a device to plan for; None: as found.
    """
    ranks = 1 if single else ranks
    if device == "cpu":
        ranks = ranks or 1
        free, total = (getattr(psutil.virtual_memory(), name) // ranks for name in ("available", "total"))
        free = int(memory_gib * GIB) if memory_gib else free
        text = f"CPU, {ranks} process{'es' if ranks > 1 else ''} with {free / GIB:.1f} GiB of memory each"
        report.ok("devices", text)
        return Devices(kind="cpu", ranks=ranks, names=(), memory=free, total=total, text=text)
    found = list_gpus()
    asked = visible if visible is not None else os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = found if asked is None else _selected(found, asked)
    if gpus is None:
        there = ", ".join(gpu.index for gpu in found) or "none"
        report.fail(
            "devices", f"GPUs {asked!r} are asked for, this machine has {there}", "correct --cuda_visible_devices"
        )
        return None
    if not gpus:
        hint = "" if asked is None else f" (CUDA_VISIBLE_DEVICES is {asked!r})"
        text = f"no GPU: nvidia-smi finds none{hint}"
        report.fail("devices", text, "check driver and container (nvidia-smi), or set --device cpu to train on the CPU")
        return None
    ranks = ranks or len(gpus)
    if ranks > len(gpus):
        report.fail("devices", f"{ranks} processes for {len(gpus)} GPUs", f"set --num_processes {len(gpus)}, or less")
        return None
    gpus = gpus[:ranks]
    old = [gpu for gpu in gpus if gpu.capability < _BF16_CAPABILITY]
    if precision == "bf16" and old:
        text = f"GPU {old[0].index} ({old[0].name}, compute capability {old[0].capability}) has no bf16"
        report.fail("devices", text, "set --bf16 False --fp16 True")
        return None
    busy = [gpu for gpu in gpus if gpu.free < 0.9 * gpu.total]
    for gpu in busy:
        text = f"GPU {gpu.index} has {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free: others use it"
        report.warn("devices", text, "see nvidia-smi; the layout is chosen for what is free")
    free, total = min(gpu.free for gpu in gpus), min(gpu.total for gpu in gpus)
    free = int(memory_gib * GIB) if memory_gib else free
    text = f"{ranks} x {gpus[0].name}, {free / GIB:.1f} GiB each, {precision}"
    report.ok("devices", text)
    names = tuple(gpu.index for gpu in gpus) if asked is None else tuple(_words(asked)[:ranks])
    return Devices(kind="cuda", ranks=ranks, names=names, memory=free, total=total, text=text)


def _words(asked: str) -> list[str]:
    return [word.strip() for word in asked.split(",") if word.strip()]


def _selected(gpus: list[Gpu], asked: str) -> list[Gpu] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, by number or start of the UUID; None: one of them is not there."""
    chosen = []
    for word in _words(asked):
        if word == "-1":
            break
        match = [gpu for gpu in gpus if gpu.index == word or (not word.isdecimal() and gpu.uuid.startswith(word))]
        if not match:
            return None
        chosen.append(match[0])
    return chosen


# ---- disk, port ----


def check_outputs(report: Report, folders: Mapping[str, Path]) -> None:
    """Tries to write where the run will: setting -> folder."""
    failures = len(report.failed)
    settings: dict[Path, list[str]] = {}
    for setting, folder in folders.items():
        settings.setdefault(folder, []).append(setting)
    for folder, names in settings.items():  # one folder, one line
        try:
            trial_write(folder, ", ".join(names))
        except ConfigError as error:
            report.fail(
                "output", str(error), "name a folder that can be written: --output_dir, --shard_cache, --logging_dir"
            )
    if len(report.failed) == failures:
        report.ok("output", ", ".join(dict.fromkeys(str(folder) for folder in folders.values())))


def check_disk(report: Report, needs: Mapping[Path, Mapping[str, int]]) -> None:
    """Checks free space: folder -> what goes there -> bytes. Folders on one file system share it."""
    by_device: dict[int, dict[str, Any]] = {}
    for folder, parts in needs.items():
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        group = by_device.setdefault(os.stat(there).st_dev, {"folder": there, "parts": {}})
        for name, size in parts.items():
            group["parts"][name] = group["parts"].get(name, 0) + size
    for group in by_device.values():
        free, parts = shutil.disk_usage(group["folder"]).free, group["parts"]
        need = sum(parts.values()) + _SLACK_BYTES
        words = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
        text = f"{group['folder']}: {need / 1e9:.2f} GB needed ({words}), {free / 1e9:.2f} GB free"
        if free >= need:
            report.ok("disk", text)
        else:
            advice = (
                "make room, choose another --output_dir, or keep fewer checkpoints (--save_total_limit, --save_steps)"
            )
            report.fail("disk", text, advice)


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
