"""What a family's twin is compared with: transformers' model; where it has none, Llama (InternLM2), plain torch (XComposer2)."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm import registry
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.testing.parity import hf_reference
from megatron_vlm.testing.twins.internlm2 import fuse, llama_inputs
from megatron_vlm.testing.twins.peft import adamw_training, peft_training
from megatron_vlm.testing.twins.small_families import SmallTwin
from megatron_vlm.testing.twins.xcomposer2_reference import Reference

Ran = tuple[float, Tensor, dict[str, Tensor]]
"""Loss, logits [sum of lengths, V], gradients by the names of the files."""


class TransformersSide:
    """A model of transformers.

    Attributes:
        hf_class: its class, which PEFT can be put on under the names of our weight map; None: it is another model's.
    """

    def __init__(self, twin: SmallTwin):
        spec = registry.get(twin.family)
        made = spec.reference(twin.config) if spec.reference else None
        self.hf_class: str | None = None
        self._mapping, self._groups = spec.mapping(twin.config), twin.config.text.num_query_groups
        if made is not None:
            self.model: Any = made.load(Path(twin.directory), torch.float32)
            self.inputs, self.hf_class = made.inputs, made.hf_class
        else:  # InternLM2, of which its writer returns the Llama that computes the same
            self.model, self.inputs = twin.made, llama_inputs

    def run(self, samples: Sequence[EncodedSample], exact: bool = False) -> Ran:
        """One sample at a time; ``exact``: in fp64."""
        model = copy.deepcopy(self.model).double() if exact else self.model
        loss, logits, grads = hf_reference(model, samples, inputs=self.inputs)
        if self.hf_class is None:
            return loss, logits, fuse(grads, self._groups)
        reached = {name: grad for name, grad in grads.items() if grad.any()}  # not the layers after a selected one
        return loss, logits, {self._mapping.hf_aliases(name): grad for name, grad in reached.items()}

    def train(self, samples: Sequence[EncodedSample], steps: int, lr: float) -> list[tuple[float, float]]:
        """Loss and gradient norm of each update."""
        return peft_training(copy.deepcopy(self.model), samples, steps, lr, self.inputs)

    def answer(self, prompt: EncodedSample, count: int) -> list[int]:
        """The likeliest tokens, by transformers' ``generate``."""
        return hf_answer(self.model, prompt, count, self.inputs)


class PlainTorchSide:
    """XComposer2 in plain torch."""

    hf_class = None

    def __init__(self, twin: SmallTwin):
        self._directory = twin.directory

    def run(self, samples: Sequence[EncodedSample], exact: bool = False) -> Ran:
        """As of ``TransformersSide``."""
        return Reference(self._directory, torch.float64 if exact else torch.float32).run(samples)

    def train(self, samples: Sequence[EncodedSample], steps: int, lr: float) -> list[tuple[float, float]]:
        """As of ``TransformersSide``."""
        model = Reference(self._directory)

        def loss() -> float:
            for weight in model.weights.values():
                weight.grad = None
            value, _, grads = model.run(samples)
            for name, grad in grads.items():
                model.weights[name].grad = grad
            return value

        return adamw_training(list(model.weights.values()), loss, steps, lr)

    def answer(self, prompt: EncodedSample, count: int) -> list[int]:
        """As of ``TransformersSide``; the whole prompt anew for every token."""
        return plain_answer(Reference(self._directory), prompt, count)


def side_of(twin: SmallTwin) -> TransformersSide | PlainTorchSide:
    """What a twin is compared with."""
    return PlainTorchSide(twin) if twin.family == "xcomposer2" else TransformersSide(twin)


def hf_answer(model: Any, prompt: EncodedSample, count: int, inputs: Any) -> list[int]:
    """The ``count`` likeliest tokens after a prompt, by transformers' ``generate``."""
    if hasattr(model.base_model, "rope_deltas"):  # Qwen2.5-VL would go on with those of the prompt before
        model.base_model.rope_deltas = None
    with torch.no_grad():
        out = model.generate(
            **inputs(prompt, torch.float32), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
            bad_words_ids=None,
        )  # fmt: skip
    return out[0, len(prompt.input_ids) :].tolist()


def plain_answer(model: Reference, prompt: EncodedSample, count: int) -> list[int]:
    """The same by XComposer2's reference."""
    ids = prompt.input_ids
    for _ in range(count):
        with torch.no_grad():
            following = model.logits(dataclasses.replace(prompt, input_ids=ids))[-1].argmax()
        ids = torch.cat([ids, following[None]])
    return ids[len(prompt.input_ids) :].tolist()
