"""A tiny twin of every family and rows of it with as many images as a test asks for."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm import registry
from megatron_vlm.data.row import EncodedSample, Row, row_from_samples
from megatron_vlm.files import read_json
from megatron_vlm.testing.twins import gemma3 as twin_gemma3
from megatron_vlm.testing.twins import internlm2 as twin_internlm2
from megatron_vlm.testing.twins import internvl3 as twin_internvl3
from megatron_vlm.testing.twins import llava_internlm2 as twin_llava_internlm2
from megatron_vlm.testing.twins import llava_next as twin_llava_next
from megatron_vlm.testing.twins import qwen2_5_vl as twin_qwen2_5_vl
from megatron_vlm.testing.twins import qwen3_vl as twin_qwen3_vl
from megatron_vlm.testing.twins import smolvlm as twin_smolvlm
from megatron_vlm.testing.twins import xcomposer2 as twin_xcomposer2
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.internvl3 import write_tiny_internvl3
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava
from megatron_vlm.testing.twins.smolvlm import write_tiny_smolvlm
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2

Specs = Sequence[tuple[int, int]]
"""(number of images, tokens of text) of each sample."""

_SIZES = ((24, 24), (40, 16), (16, 32))
_GRIDS = ((1, 1), (1, 2), (2, 1))
NAMES = (
    "gemma3",
    "idefics2",
    "idefics2_llama3",
    "internvl3",
    "llava_internlm2",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "xcomposer2",
    "xcomposer2_hd",
    "smolvlm",
    "internlm2",
)
"""Families of the registry; of InternLM-XComposer2 the one whose images are squares, and the one of tiles."""


@dataclass(frozen=True, kw_only=True)
class SmallTwin:
    """One twin on disk.

    Attributes:
        family: name in the registry.
        directory: of the HF checkpoint.
        hf_config: content of its config.json.
        draw: ``draw(twin, specs, seed)`` makes samples.
        made: what the function that writes it returns: transformers' model, where it has one.
    """

    family: str
    directory: str
    hf_config: dict[str, Any]
    draw: Callable[["SmallTwin", Specs, int], list[EncodedSample]]
    made: Any = None

    @functools.cached_property
    def config(self) -> Any:
        """Of the model."""
        return registry.get(self.family).config(self.hf_config)

    def row(self, specs: Specs, seed: int = 0, **filling: Any) -> Row:
        """A row of samples; none: a row of filler. ``filling`` as of ``row_from_samples``."""
        return row_from_samples(self.draw(self, specs, seed) if specs else [], **filling)


def write_small_twin(name: str, directory: Path, **options: Any) -> SmallTwin:
    """Writes the twin called ``name`` (one of ``NAMES``); ``options`` go to the function that writes it."""
    family, write, draw = _TWINS[name]
    directory.mkdir(parents=True, exist_ok=True)
    made, hf_config = write(directory, **options), read_json(directory / "config.json")
    return SmallTwin(family=family, directory=str(directory), hf_config=hf_config, draw=draw, made=made)


def names_of(family: str) -> list[str]:
    """The twins of a family of the registry."""
    return [name for name in NAMES if _TWINS[name][0] == family]


def _write_llama3(directory: Path, **options: Any) -> Any:
    return write_tiny_idefics2(directory, **{"text": "llama", "tie": True, **options})


def _idefics2(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    from megatron_vlm.testing.parity import random_samples  # megatron-core

    return random_samples(twin.config, [([_SIZES[i % 3] for i in range(images)], text) for images, text in specs], seed)


def _internvl3(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    return twin_internvl3.make_samples(
        twin.config, [([1 + i % 2 for i in range(images)], text) for images, text in specs], seed
    )


def _qwen_vl(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    return twin_qwen2_5_vl.make_samples(
        twin.config, [([(1 + i % 2, 3) for i in range(images)], text) for images, text in specs], seed
    )


def _llava(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    return twin_llava_internlm2.make_samples(twin.config, specs, seed)


def _llava_next(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    return twin_llava_next.make_samples(twin.config, specs, seed)


def _write_onevision(directory: Path, **options: Any) -> Any:
    return twin_llava_next.write_tiny_llava_next(directory, "LlavaOnevision", **options)


def _write_xcomposer2_hd(directory: Path, **options: Any) -> None:
    write_tiny_xcomposer2(directory, variant="4khd-7b", **options)


def _xcomposer2(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    grids = _GRIDS if twin.config.hd else ((1, 1),)
    return twin_xcomposer2.make_samples(
        twin.hf_config, [([grids[i % len(grids)] for i in range(n)], text) for n, text in specs], seed
    )


def _gemma3(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    return twin_gemma3.make_samples(twin.config, specs, seed)


def _smolvlm(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    return twin_smolvlm.make_samples(twin.config, specs, seed)


def _internlm2(twin: SmallTwin, specs: Specs, seed: int) -> list[EncodedSample]:
    return twin_internlm2.make_samples(twin.config.text.vocab_size, [text for _, text in specs], seed)


_TWINS: dict[str, tuple[str, Callable[..., object], Callable[[SmallTwin, Specs, int], list[EncodedSample]]]] = {
    "gemma3": ("gemma3", twin_gemma3.write_tiny_gemma3, _gemma3),
    "idefics2": ("idefics2", write_tiny_idefics2, _idefics2),
    "idefics2_llama3": ("idefics2_llama3", _write_llama3, _idefics2),
    "internvl3": ("internvl3", write_tiny_internvl3, _internvl3),
    "llava_internlm2": ("llava_internlm2", write_tiny_llava, _llava),
    "llava_next": ("llava_next", twin_llava_next.write_tiny_llava_next, _llava_next),
    "llava_onevision": ("llava_next", _write_onevision, _llava_next),
    "qwen2_5_vl": ("qwen2_5_vl", twin_qwen2_5_vl.write_tiny_qwen2_5_vl, _qwen_vl),
    "qwen3_vl": ("qwen3_vl", twin_qwen3_vl.write_tiny_qwen3_vl, _qwen_vl),
    "xcomposer2": ("xcomposer2", write_tiny_xcomposer2, _xcomposer2),
    "xcomposer2_hd": ("xcomposer2", _write_xcomposer2_hd, _xcomposer2),
    "smolvlm": ("smolvlm", write_tiny_smolvlm, _smolvlm),
    "internlm2": ("internlm2", write_tiny_internlm2, _internlm2),
}
