"""How Hugging Face's models are run beside ours for ``convert verify``: what the families' references share.

Activations of both sides are brought to [rows, width]: patches of all images, latents of all images, tokens of all samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A module whose output is compared: its path in our model and in HF's, and what its rows are."""

    ours: str
    theirs: str
    rows: Literal["patches", "latents", "tokens"]


def layer_probes(ours: str, theirs: str, count: int, rows: Literal["patches", "latents", "tokens"]) -> list[Probe]:
    """Probes of ``count`` layers in a row."""
    return [Probe(ours=f"{ours}.{i}", theirs=f"{theirs}.{i}", rows=rows) for i in range(count)]


def decoder_probes(theirs: str, count: int) -> list[Probe]:
    """Probes of a decoder's layers and final norm; HF's decoder is ``theirs``."""
    ours = "language_model.decoder"
    last = Probe(ours=f"{ours}.final_layernorm", theirs=f"{theirs}.norm", rows="tokens")
    return [*layer_probes(f"{ours}.layers", f"{theirs}.layers", count, "tokens"), last]


class Reference:
    """HF's side of a comparison; a family adds ``samples``, ``inputs`` and ``probes``.

    Args:
        config: of the model.
    """

    hf_class: ClassVar[str]
    """Name of the class in transformers."""

    def __init__(self, config: Any):
        self.config = config

    def load(self, directory: Path, dtype: torch.dtype) -> nn.Module:
        """HF's model with eager attention, in ``dtype``."""
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()
        kind = getattr(transformers, self.hf_class)
        return kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and several images; from the config alone."""
        raise NotImplementedError

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        raise NotImplementedError

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        raise NotImplementedError

    def real_rows(self, probe: Probe, output: Tensor, sample: EncodedSample) -> Tensor:
        """HF's output for one sample -> [rows, width], without padding where there is any."""
        return output.reshape(-1, output.shape[-1])

    def any_but_image(self, generator: torch.Generator) -> Callable[[int], list[int]]:
        """Draws that many random ids, of any token but the image's."""

        def draw(count: int) -> list[int]:
            ids = torch.randint(0, self.config.text.vocab_size - 1, (count,), generator=generator)
            return (ids + (ids >= self.config.image_token_id)).tolist()

        return draw


def random_sample(
    key: str, draw: Callable[[int], list[int]], images: Sequence[int], image_id: int, words: int
) -> EncodedSample:
    """A sample without pixels: a token, images of as many tokens as ``images`` says, each after a token, and ``words`` tokens."""
    ids = draw(1)
    positions: list[int] = []
    for count in images:
        ids += draw(1)
        positions += range(len(ids), len(ids) + count)
        ids += [image_id] * count
    ids += draw(words)
    labels = torch.tensor(ids)
    labels[positions] = IGNORE_INDEX
    return EncodedSample(
        key=key,
        input_ids=torch.tensor(ids),
        labels=labels,
        pixels=(),
        image_positions=torch.tensor(positions, dtype=torch.int64),
    )
