"""The forward and full levels of ``convert verify``: HF in fp64, HF in fp32 and ours in fp32 on the same samples, in turn.

HF's distance between its own fp32 and fp64 is the noise floor of the computation; ours is measured from the same fp64
reference, so that the verdict does not depend on depth, width or the scale of weights.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.conversion.load import load_model
from megatron_vlm.conversion.report import Report, Row, module_of
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample, row_from_samples
from megatron_vlm.models.built import global_named_parameters
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.sources.source import WeightSource

TIMES_NOISE = 3.0
"""How many times HF's own fp32-fp64 distance ours may be. Measured on twins: up to 1.5 (activations), 1.9 (gradients)."""
ACTIVATION_FLOOR = 1e-6
"""Relative distance that always passes: a few roundings, where HF's own distance is by chance smaller."""
GRADIENT_FLOOR = 1e-5
"""The same of a gradient, times the larger of its norm and 1e-3 of the norm of all gradients of its module."""


@dataclass
class Run:
    """What one model computed. ``gradients`` are under HF names, of the mean loss."""

    logits: Tensor
    activations: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)


def compare_runs(hf_dir: Path, source: WeightSource, report: Report, *, gradients: bool) -> None:
    """Runs the three models and adds their tables to the report."""
    assert source.spec.reference is not None
    reference = source.spec.reference(source.config)
    samples = reference.samples()
    exact = run_hf(reference, hf_dir, source, samples, torch.float64, gradients)
    noise = run_hf(reference, hf_dir, source, samples, torch.float32, gradients)
    ours = run_ours(reference, source, samples, gradients)
    images = sum(len(sample.pixels) for sample in samples)
    report.say("")
    report.say(
        f"{len(samples)} samples, {images} images, {len(exact.logits)} tokens; distances are relative, from HF in fp64 with "
        "the weights of --load"
    )
    header = ("HF fp32", "ours", "ratio")
    report.table("activations", header, _activation_rows(exact, noise, ours))
    if gradients:
        report.table("gradients (worst of each module)", header, _gradient_rows(exact, noise, ours))


def run_hf(
    reference: Any,
    hf_dir: Path,
    source: WeightSource,
    samples: Sequence[EncodedSample],
    dtype: torch.dtype,
    gradients: bool,
) -> Run:
    """HF's model, one sample at a time. Weights are rounded as the verified ones are, where those were cast."""
    model = reference.load(hf_dir, dtype)
    with torch.no_grad():
        parameters = {source.mapping.hf_aliases(name): p for name, p in model.named_parameters()}
        for name, entry in source.entries.items():
            for hf_name in entry.hf:
                parameters[hf_name].copy_(parameters[hf_name].to(source.infos[name].dtype))
    pieces: dict[str, list[Tensor]] = {probe.ours: [] for probe in reference.probes()}
    logits, losses = [], []
    current: list[EncodedSample] = []

    def keep(probe: Any, output: Tensor) -> None:
        pieces[probe.ours].append(reference.real_rows(probe, output, current[0]))

    total = sum(int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in samples)
    with hooks(model, [(probe, probe.theirs) for probe in reference.probes()], keep), torch.set_grad_enabled(gradients):
        for sample in samples:
            current[:] = [sample]
            output = model(**reference.inputs(sample, dtype)).logits[0]
            loss = F.cross_entropy(output[:-1], sample.labels[1:], ignore_index=IGNORE_INDEX, reduction="sum") / total
            if gradients:
                loss.backward()
            logits.append(output.detach())
            losses.append(float(loss.detach()))
    run = Run(
        logits=torch.cat(logits),
        activations={name: torch.cat(parts) for name, parts in pieces.items()},
        loss=sum(losses),
    )
    if gradients:
        run.gradients = {name: _float(p.grad, p) for name, p in parameters.items()}
    return run


def run_ours(reference: Any, source: WeightSource, samples: Sequence[EncodedSample], gradients: bool) -> Run:
    """Our model on one process, all samples packed in one row, weights merged from the source's shards."""

    cpu.install()
    device = torch.device("cpu")
    init_process_group(device)
    topology = build_topology(ParallelConfig(), num_layers=source.config.text.num_layers, device=device)
    (model,) = load_model(source, topology, ModelOptions(make_vocab_size_divisible_by=1))
    model.eval()
    row = row_from_samples(samples)
    batch = row
    run = Run(logits=torch.empty(0))

    def keep(probe: Any, output: Tensor) -> None:
        run.activations[probe.ours] = output.reshape(-1, output.shape[-1])

    with hooks(model, [(probe, probe.ours) for probe in reference.probes()], keep), torch.no_grad():
        run.logits = model.logits(batch)
    if gradients:
        loss = model(batch) / row.num_supervised
        loss.backward()
        run.loss = float(loss.detach())
        for name, parameter in global_named_parameters(model):
            entry = source.entries[name]
            run.gradients |= dict(zip(entry.hf, entry.from_full(_float(parameter.grad, parameter)), strict=True))
    return run


@contextmanager
def hooks(model: nn.Module, probes: Sequence[tuple[Any, str]], keep: Any) -> Iterator[None]:
    """Calls ``keep(probe, output)`` with the detached output of each named module, as often as it runs."""
    handles = []
    for probe, path in probes:

        def hook(_module: nn.Module, _args: Any, output: Any, probe: Any = probe) -> None:
            keep(probe, (output[0] if isinstance(output, tuple) else output).detach())

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        gc.collect()


def _activation_rows(exact: Run, noise: Run, ours: Run) -> Iterator[Row]:
    for name, reference in exact.activations.items():
        scale = float(reference.double().norm())
        theirs, mine = (_distance(run.activations[name], reference) / scale for run in (noise, ours))
        yield _row(name, theirs, mine, ACTIVATION_FLOOR)
    largest = float(exact.logits.abs().max())
    theirs, mine = (float((run.logits.double() - exact.logits).abs().max()) / largest for run in (noise, ours))
    yield _row("logits (largest difference)", theirs, mine, ACTIVATION_FLOOR)


def _gradient_rows(exact: Run, noise: Run, ours: Run) -> Iterator[Row]:
    theirs, mine = (abs(run.loss - exact.loss) / abs(exact.loss) for run in (noise, ours))
    yield _row("loss", theirs, mine, ACTIVATION_FLOOR)
    if ours.gradients.keys() != exact.gradients.keys():
        names = sorted(ours.gradients.keys() ^ exact.gradients.keys())
        yield Row("gradients of other parameters: " + ", ".join(names[:5]), ("", "", ""), False)
        return
    modules: dict[str, list[str]] = {}
    for name in exact.gradients:
        modules.setdefault(module_of(name), []).append(name)
    for module, names in modules.items():
        whole = float(torch.stack([exact.gradients[name].double().norm() for name in names]).norm())
        rows = []
        for name in names:
            scale = max(float(exact.gradients[name].double().norm()), 1e-3 * whole, 1e-30)
            theirs, mine = (_distance(run.gradients[name], exact.gradients[name]) / scale for run in (noise, ours))
            rows.append((mine / max(TIMES_NOISE * theirs, GRADIENT_FLOOR), theirs, mine))
        _, theirs, mine = max(rows)
        yield _row(module, theirs, mine, GRADIENT_FLOOR)


def _row(name: str, theirs: float, mine: float, floor: float) -> Row:
    ratio = f"{mine / theirs:.1f}" if theirs else "-"
    return Row(name, (f"{theirs:.1e}", f"{mine:.1e}", ratio), mine <= max(TIMES_NOISE * theirs, floor))


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).norm()) if left.shape == right.shape else float("inf")


def _float(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """fp32 copy: what the comparison needs, in half the memory of the fp64 model's."""
    return torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float()
