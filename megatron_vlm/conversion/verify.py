"""``convert verify``: is what lies in ``--load`` the model of ``--hf``, and does it compute the same?

    weights   every tensor, through the inverse mapping, bit for bit, streamed; and config.json. Of another dtype than HF's
              (``--dtype``), they must be HF's values rounded to it, bit for bit, and the last line says so
    forward   activations module by module, and logits, against HF eager, on a small batch made from the config
    full      the same, and loss and gradients of every parameter

Tolerances are calibrated: ours may lie at most a few times as far from HF in fp64 as HF in fp32 does.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.conversion.report import Report, Row, module_of
from megatron_vlm.errors import ConfigError, ConversionError, MegatronVLMError, nearest
from megatron_vlm.files import file_digest
from megatron_vlm.processes import available_memory
from megatron_vlm.sources.hf import HFSource
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.hf_io import CONFIG_NAME, list_names, resolve_directory
from megatron_vlm.weights.mapping import TensorInfo
from megatron_vlm.weights.model_folder import is_weights
from megatron_vlm.weights.safetensors_io import cast

LEVELS = ("weights", "forward", "full")
BYTES_PER_PARAMETER = {"forward": 9, "full": 18}
"""fp64 weights of HF, with gradients for ``full``, and some room. One model is in memory at a time."""
_IMPORTS_BYTES = 10**9
_PART = 1 << 24
_IGNORED_KEYS = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def verify(
    hf: str | os.PathLike, load: str | os.PathLike, *, level: str | None = None, family: str | None = None
) -> Report:
    """Compares ``load`` (Megatron weights, a training checkpoint or an HF export) with the HF model ``hf``.

    Args:
        hf, load: directories or hub ids.
        level: ``weights``, ``forward`` or ``full``; None: the highest that fits in memory.
        family: checked against both; None: what the files say.

    Returns:
        The report, printed on the way.

    Raises:
        ConfigError: no such level, or the family does not offer it.
        ConversionError: something cannot be read.
    """
    if level is not None and level not in LEVELS:
        raise ConfigError(f"unknown level {level!r}{nearest(level, LEVELS)}")
    directory = resolve_directory(hf)
    # Digests are compared at the end, so that what differs is told by its meaning first.
    with (
        open_source(directory, family, verify_hashes=False) as expected,
        open_source(load, family, verify_hashes=False) as source,
    ):
        if not isinstance(expected, HFSource):
            raise ConversionError(
                f"--hf {directory} holds {expected.kind} weights, not an HF model: swap --hf and --load?"
            )
        source.require_full("comparing it with an HF model")
        chosen, why = _choose_level(level, source)
        report = Report(level=chosen)
        report.say(f"{load} ({source.kind}, family {source.spec.name}) against {directory}")
        report.say(f"level {chosen}: {why}")
        _compare_configs(expected, source, report)
        report.table(
            "weights", ("tensors", "GB", "dtype", "largest difference"), _compare_weights(expected, source, report)
        )
        _compare_files(expected, source, report)
        for record in (*expected.records(), *source.records()):
            try:
                record.check_digests()
            except MegatronVLMError as error:
                report.passed = False
                report.say(str(error))
        if chosen != "weights" and report.passed:
            from megatron_vlm.conversion.verify_forward import compare_runs  # loads megatron-core

            compare_runs(directory, source, report, gradients=chosen == "full")
        elif chosen != "weights":
            report.say(f"the {chosen} comparison is left out: the weights differ already")
    report.say("")
    report.say(f"verify {chosen}: " + (f"passed, weights {report.weights}" if report.passed else "FAILED"))
    return report


def _choose_level(level: str | None, source: WeightSource) -> tuple[str, str]:
    parameters = sum(torch.Size(info.shape).numel() for info in source.infos.values())
    available = available_memory()
    if source.spec.reference is None or source.spec.reference(source.config) is None:
        if level not in (None, "weights"):
            raise ConfigError(f"family {source.spec.name} has no HF model to run beside: use --level weights")
        return "weights", "transformers has no model of this layout to run beside"
    if level is not None:
        return level, "as asked for"
    need = {name: BYTES_PER_PARAMETER[name] * parameters + _IMPORTS_BYTES for name in ("full", "forward")}
    for name, size in need.items():
        if size < available:
            return name, f"the highest that fits: it needs about {size / 1e9:.2f} GB of {available / 1e9:.1f} GB free"
    return "weights", f"forward would need about {need['forward'] / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"


def _compare_configs(expected: HFSource, source: WeightSource, report: Report) -> None:
    changes = list(_differences(expected.hf_config, source.hf_config))
    if changes:
        report.passed = False
        report.say(f"config.json differs: {list_names(changes)}")


def _compare_files(expected: HFSource, source: WeightSource, report: Report) -> None:
    """Tokenizer, processor and the like of ``--hf`` against those that ``--load`` was made from: its record holds their digests.

    config.json is compared by its values, and weights tensor by tensor.
    """
    for name, entry in (source.source_files or {}).items():
        if name == CONFIG_NAME or is_weights(Path(name).name):
            continue
        path = expected.hf_dir / name
        same = path.is_file() and file_digest(path, ConversionError)["sha256"] == entry.sha256
        if not same:
            report.passed = False
            what = "is not the file" if path.is_file() else "is absent; there was one"
            report.say(f"{path} {what} that {source.hf_dir.parent} was made from")


def _differences(left: Any, right: Any, path: str = "") -> Iterable[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(set(left) | set(right)):
            if key not in _IGNORED_KEYS:
                yield from _differences(left.get(key), right.get(key), f"{path}.{key}" if path else key)
    elif left != right:
        yield f"{path} {left!r} -> {right!r}"


@dataclass
class _Tally:
    """Sums over the tensors of one module."""

    tensors: int = 0
    size: int = 0
    dtypes: set[str] = field(default_factory=set)
    largest: float = 0.0
    rounding: float = 0.0
    rounded_to: set[str] = field(default_factory=set)
    different: list[str] = field(default_factory=list)


def _compare_weights(expected: HFSource, source: WeightSource, report: Report) -> list[Row]:
    """One row per module, after every tensor went back through the inverse mapping."""
    tallies: dict[str, _Tally] = {}
    missing = sorted(set(expected.infos) - set(source.infos))
    extra = sorted(set(source.infos) - set(expected.infos))
    for what, names in (("missing", missing), ("extra", extra)):
        if names:
            report.passed = False
            report.say(f"{len(names)} tensors {what}: {list_names(names)}")
    for name in source.infos:  # the order of the files, so that digests cost no second pass
        if name in expected.infos:
            tally = tallies.setdefault(module_of(name), _Tally())
            _compare_tensor(expected, source, name, tally)
    rows: list[Row] = []
    for module, tally in tallies.items():
        cells = (str(tally.tensors), f"{tally.size / 1e9:.3f}", ", ".join(sorted(tally.dtypes)), f"{tally.largest:.3g}")
        rows.append(Row(module, cells, not tally.different))
        for text in tally.different[:5]:
            report.say(f"differs: {text}")
    report.weights = _how_equal(tallies.values())
    return rows


def _how_equal(tallies: Iterable[_Tally]) -> str:
    """In words, of weights that all passed."""
    dtypes = ", ".join(sorted(set[str]().union(*(tally.rounded_to for tally in tallies))))
    if not dtypes:
        return "equal bit for bit"
    rounding = max(tally.rounding for tally in tallies)
    if not rounding:
        return f"equal, every value of HF's is one of {dtypes}"
    return f"equal to HF's rounded to {dtypes}, which changes values by up to {rounding:.2g}"


def _compare_tensor(expected: HFSource, source: WeightSource, name: str, tally: _Tally) -> None:
    entry = source.entries[name]
    for hf_name, ours in zip(entry.hf, entry.from_full(source.read(name)), strict=True):
        theirs = expected.read_stored(hf_name)
        label = _short(ours.dtype)
        if theirs.dtype != ours.dtype:  # converted with --dtype: the cast itself must be exact
            label = f"{_short(theirs.dtype)} -> {label}"
            exact, theirs = theirs, cast(theirs, ours.dtype)
            tally.rounded_to.add(_short(ours.dtype))
            tally.rounding = max(tally.rounding, _distance(exact, theirs))
        tally.tensors += 1
        tally.size += TensorInfo.of(ours).nbytes
        tally.dtypes.add(label)
        if ours.shape != theirs.shape:
            tally.different.append(f"{hf_name} has shape {list(ours.shape)}, HF has {list(theirs.shape)}")
        elif not _same_bits(ours, theirs):
            difference = _distance(ours, theirs)
            tally.largest = max(tally.largest, difference)
            count = int((ours != theirs).sum())
            tally.different.append(f"{hf_name}: {count:,} of {ours.numel():,} values, by up to {difference:.3g}")


def _distance(left: Tensor, right: Tensor) -> float:
    """The largest difference, without a copy of the whole in a wider dtype."""
    parts = zip(left.reshape(-1).split(_PART), right.reshape(-1).split(_PART))
    return max((float((a.double() - b.double()).abs().max()) for a, b in parts if a.numel()), default=0.0)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right))
    return torch.equal(a, b)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
