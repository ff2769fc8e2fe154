"""What a card claims of a family, measured on its twins by the measures of the tests.

twins, reference --claim--> Outcome
"""

import dataclasses
import functools
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from megatron_vlm import registry
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.conversion.verify import verify
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.models.generation import Answer
from megatron_vlm.testing import layouts
from megatron_vlm.testing.cards.page import Outcome
from megatron_vlm.testing.cards.references import side_of
from megatron_vlm.testing.distributed import RankError, run_distributed
from megatron_vlm.testing.parity import (
    adapted_mapping,
    gradient_errors,
    layout_answers,
    layout_logits,
    layout_run,
    merge_gradients,
)
from megatron_vlm.testing.parity_check import Bars, Distances, measure_parity
from megatron_vlm.testing.twins.common import randomise
from megatron_vlm.testing.twins.peft import peft_gradients, peft_twin, twin_in_4bit
from megatron_vlm.testing.twins.small_families import names_of, write_small_twin

SAMPLES = ((1, 14), (0, 23), (3, 9), (1, 5))  # images, tokens of text
ROWS = (((0, 23),), ((1, 14), (0, 9)), ((2, 7),), ((0, 17),))  # the first is text alone
PROMPTS = ((2, 9), (0, 13), (1, 4))
BARS = Bars(logits=2e-5)
UPDATES, UPDATE_LR, UPDATE_BAR, NEW_TOKENS = 50, 1e-3, 2e-4, 12
OPTIONS: dict[str, dict[str, Any]] = {  # so that the sliding window, dynamic NTK and virtual stages act
    "gemma3": {"text": {"head_dim": 16}},  # attention's output in whole blocks of 64, as bitsandbytes' CPU kernel needs
    "idefics2": {"sliding_window": 11},
    "internlm2": {"max_position_embeddings": 20},
    "qwen3_vl": {
        "text": {
            "num_hidden_layers": 8,  # virtual stages hold the layers of all levels
            "head_dim": 16,  # rows of whole blocks, which _write_whole_blocks needs
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2]},
        }
    },
}


class _NotVerified(Exception):
    """A claim that cannot be measured here; the message says why."""


class Bench:
    """The twins of a family, the last of which stands for it where one is enough."""

    def __init__(self, family: str, folder: Path):
        logging.disable_progress_bar()
        self.spec, self.folder = registry.get(family), folder
        self.twins = {name: write_small_twin(name, folder / name, **OPTIONS.get(name, {})) for name in names_of(family)}
        self.sides = {name: side_of(twin) for name, twin in self.twins.items()}
        self.name, self.twin = list(self.twins.items())[-1]
        self.side = self.sides[self.name]

    def measure(self, claim: str) -> Outcome:
        """The outcome of one claim."""
        try:
            return _CLAIMS[claim](self)
        except _NotVerified as reason:
            return Outcome(bar="", measured=str(reason), passed=None)
        except (AssertionError, RankError) as error:
            return Outcome(bar="", measured=" ".join(str(error).split())[:300], passed=False)

    @functools.cached_property
    def samples(self) -> dict[str, list[Any]]:
        """Of each twin."""
        return {name: twin.draw(twin, SAMPLES, 0) for name, twin in self.twins.items()}

    @functools.cached_property
    def parity(self) -> dict[str, Distances]:
        """Of each twin."""
        return {
            name: measure_parity(
                twin.directory,
                self.samples[name],
                self.sides[name].run(self.samples[name]),
                self._exact[name][1],
                self.no_true_gradient(name),
            )
            for name, twin in self.twins.items()
        }

    @functools.cached_property
    def _exact(self) -> dict[str, Any]:
        return {name: self.sides[name].run(self.samples[name], exact=True) for name in self.twins}

    def no_true_gradient(self, name: str) -> Callable[[str], bool]:
        """Whether a gradient is zero but for round-off: in fp64, where transformers' softmax stays in fp32."""
        grads = self._exact[name][2]
        floor = 1e-7 * float(torch.stack([grad.norm() for grad in grads.values()]).norm())
        return lambda parameter: float(grads[parameter].norm()) < floor


def _round_trip(bench: Bench) -> Outcome:
    passed, said, tensors = True, [], 0
    for name, twin in bench.twins.items():
        mg, hf = bench.folder / f"{name}_mg", bench.folder / f"{name}_hf"
        with redirect_stdout(io.StringIO()):
            hf2mg(twin.directory, mg, tp=2, pp=2)
            mg2hf(mg, hf)
            reports = [verify(twin.directory, folder, level="weights") for folder in (mg, hf)]
        passed &= all(report.passed for report in reports)
        said += [report.weights for report in reports]
        with open_source(twin.directory) as source:
            tensors += sum(len(entry.hf) for entry in source.entries.values())
    return Outcome(
        bar="equal bit for bit", measured=f"{', '.join(dict.fromkeys(said))}: {tensors} tensors", passed=passed
    )


def _logits(bench: Bench) -> Outcome:
    found = bench.parity.values()
    off = max(each.logits / each.largest for each in found)
    noise = max(each.logits / each.noise for each in found)
    apart = max(each.apart / each.largest for each in found)
    return Outcome(
        bar=f"{BARS.logits:.0e} of the largest, {BARS.over_noise:g} x the reference's fp32-fp64 distance",
        measured=f"{off:.1e}, {noise:.1f} x; packed from alone {apart:.1e}",
        passed=max(off, apart) <= BARS.logits and noise <= BARS.over_noise,
    )


def _gradients(bench: Bench) -> Outcome:
    worst, where = max((each.gradient, each.where) for each in bench.parity.values())
    loss = max(each.loss for each in bench.parity.values())
    # Where the true gradient is zero, the error is in units of 1e-6 of the norm of all gradients.
    zero = max(
        error
        for name, each in bench.parity.items()
        for parameter, error in each.errors.items()
        if (error <= each.gradient) or bench.no_true_gradient(name)(parameter)
    )
    return Outcome(
        bar=f"loss {BARS.loss:.0e}, each gradient {BARS.gradient:.0e} of its norm",
        measured=f"loss {loss:.1e}, {worst:.1e} (`{where}`)",
        passed=loss <= BARS.loss and worst <= BARS.gradient and zero <= 1,
    )


def _updates(bench: Bench) -> Outcome:
    samples = bench.samples[bench.name]
    row = row_from_samples(samples)
    (ours,) = run_distributed(layout_run, bench.twin.directory, [row], {}, {}, UPDATES, UPDATE_LR)
    theirs = bench.side.train(samples, UPDATES, UPDATE_LR)
    losses = [(a, b) for (a, _), (b, _) in zip(ours["history"], theirs, strict=True)]
    off = max(abs(a - b) for a, b in losses)
    return Outcome(
        bar=f"loss within {UPDATE_BAR:.0e} at each, and falling",
        measured=f"{off:.1e}; {losses[0][1]:.2f} to {losses[-1][1]:.2f}",
        passed=off <= UPDATE_BAR and losses[-1][1] < losses[0][1],
    )


def _layouts(bench: Bench) -> Outcome:
    twin = bench.twin
    check = layouts.LayoutCheck(
        family=twin.family,
        directory=twin.directory,
        hf_config=twin.hf_config,
        batches=[twin.draw(twin, row, i) for i, row in enumerate(ROWS)],
        fill=128,
        no_true_gradient=bench.no_true_gradient(bench.name),
    )
    text_alone = not hasattr(twin.config, "vision")
    least = twin.config.text.deepstack
    cases = [
        dataclasses.replace(case, vp=case.vp and max(case.vp, least))
        for case in layouts.PAIRWISE_SMALL
        if not (text_alone and case.freeze)
    ]
    found = {str(case): check.measure(case) for case in cases}
    loss, gradient, step, norm = (
        max(getattr(each, name) for each in found.values()) for name in ("loss", "gradient", "step_loss", "step_norm")
    )
    return Outcome(
        bar=f"losses {layouts.LOSS:.0e}, gradients {layouts.GRADIENT:.0e}, norms {layouts.NORM:.0e}",
        measured=f"{max(loss, step):.1e}, {gradient:.1e}, {norm:.1e}; {', '.join(found)}",
        passed=all(each.passed for each in found.values()),
    )


def _lora(bench: Bench) -> Outcome:
    return _adapters(bench, bench.twin.directory, {}, bench.side.model if bench.side.hf_class else None)  # type: ignore[union-attr]


def _qlora(bench: Bench) -> Outcome:
    try:
        metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise _NotVerified("bitsandbytes is not installed: pip install 'megatron_vlm[qlora]'") from None
    model, directory = None, ""
    if bench.side.hf_class:
        directory = str(bench.folder / "whole_blocks")
        _write_whole_blocks(bench.side.hf_class, bench.twin.directory, directory)
        model = twin_in_4bit(directory, torch.float32)
    return _adapters(bench, directory, {"quantize": "nf4"}, model)


def _write_whole_blocks(hf_class: str, twin: str, directory: str) -> None:
    """A twin in bf16 whose decoder's rows are whole blocks of 64: bitsandbytes' CPU kernel is wrong for others."""
    kind = getattr(transformers, hf_class)
    config = kind.config_class.from_pretrained(twin)
    config.text_config.intermediate_size = 128
    model: Any = randomise(kind(config)).to(torch.bfloat16)
    model.save_pretrained(directory)


def _adapters(bench: Bench, directory: str, quantised: dict[str, Any], hf: Any) -> Outcome:
    if hf is None:
        raise _NotVerified(
            "transformers has no model of these names for PEFT to act on; `pytest tests/peft` has the parts"
        )
    samples = bench.samples[bench.name]
    settings = dict(target_modules=bench.spec.adapters.language, r=4, alpha=8)
    model, tensors = peft_twin(hf, settings)
    loss, logits, grads = peft_gradients(model, samples, bench.side.inputs)  # type: ignore[union-attr]
    row, peft = row_from_samples(samples), {"tensors": tensors, **quantised, **settings}
    (ours,) = run_distributed(layout_logits, directory, [row], {}, {}, peft)
    results = run_distributed(layout_run, directory, [row], {}, {}, peft=peft)
    with open_source(directory) as source:
        mapping = adapted_mapping(source, {**quantised, **settings}, 1)
        our_loss, our_grads = merge_gradients(results, mapping, source.config.text.vocab_size)
    off = float((ours["logits"][0] - logits).abs().max()) / float(logits.abs().max())
    worst = max(gradient_errors(our_grads, grads).values())
    loss_off = abs(our_loss - loss) / loss
    return Outcome(
        bar=f"logits {BARS.logits:.0e} of the largest, loss {BARS.loss:.0e}, gradients {BARS.gradient:.0e}",
        measured=f"{off:.1e}, {loss_off:.1e}, {worst:.1e}; {len(grads)} tensors",
        passed=off <= BARS.logits and loss_off <= BARS.loss and worst <= BARS.gradient,
    )


def _generation(bench: Bench) -> Outcome:
    twin = bench.twin
    prompts = twin.draw(twin, PROMPTS, 0)
    expected = [Answer(ids=tuple(bench.side.answer(prompt, NEW_TOKENS)), finished=False) for prompt in prompts]
    layout = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
    sampling = dict(max_new_tokens=NEW_TOKENS, batch_size=len(prompts))
    ranks = run_distributed(layout_answers, twin.directory, prompts, [layout], sampling, (), tp=2, pp=2)
    equal = sum(a == b for rank in ranks for a, b in zip(rank[0], expected, strict=True))
    total = len(ranks) * len(prompts)
    return Outcome(
        bar="equal", measured=f"{equal} of {total} answers of {NEW_TOKENS} tokens equal", passed=equal == total
    )


_CLAIMS: dict[str, Callable[[Bench], Outcome]] = {
    "round-trip": _round_trip,
    "logits": _logits,
    "gradients": _gradients,
    "updates": _updates,
    "layouts": _layouts,
    "lora": _lora,
    "qlora": _qlora,
    "generation": _generation,
}
