"""Processor of LLaVA-NeXT and LLaVA-OneVision: pixels and image tokens equal to those of transformers.

    images --upright RGB, ``data/images/anyres.py``--> the whole and tiles --table--> float32 [3, views * S, S], and a View

Which prompt a folder has is told from what its chat template makes of a question: some published ones write an answer without its
end, which training needs. LLaVA-OneVision sees several images of a conversation as padded squares. Semantics: transformers 5.23.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.anyres import AnyRes, View
from megatron_vlm.data.images.pictures import pad_to_square
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.templates import IMAGE, TEMPLATES
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_json
from megatron_vlm.models.families.llava_next.config import LlavaNextModelConfig
from megatron_vlm.models.processing.chat_template import chat_template, render
from megatron_vlm.models.processing.conversation import Size
from megatron_vlm.models.processing.pixels import CLIP, NormalisedPixels, pixel_fields
from megatron_vlm.models.processing.processor_files import check_image_settings, processor_settings, special_tokens
from megatron_vlm.models.processing.template_processor import TemplateProcessor, prompt_settings

_QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}


@dataclass(frozen=True, kw_only=True)
class LlavaNextProcessor(NormalisedPixels, TemplateProcessor):
    """Encodes samples for LLaVA-NeXT and LLaVA-OneVision. Plain values only: it travels to worker processes.

    Attributes:
        anyres: sizes that images may take.
        alone: only the single image of a conversation is cut into tiles.
    """

    anyres: AnyRes
    alone: bool

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "LlavaNextProcessor":
        """Reads tokenizer, processor and model configuration of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that is not built or cannot work.
        """
        hf_dir = Path(hf_dir)
        model = LlavaNextModelConfig.from_hf(read_json(hf_dir / "config.json"))
        check_image_settings(config, model.kind, "max_image_num")
        _, images = processor_settings(hf_dir)
        pixels = pixel_fields(hf_dir, images, model.kind, Image.Resampling.BICUBIC, CLIP)
        side, sizes = model.vision.image_size, [list(size) for size in model.anyres.sizes]
        for name, wanted in (("size", {side}), ("crop_size", {side}), ("image_grid_pinpoints", sizes)):
            value = images.get(name)
            told = set(value.values()) if isinstance(value, Mapping) else value
            if value is not None and told != wanted:
                raise ConfigError(f"{hf_dir}: the image processor's {name} {value} is not the model's, {wanted}")
        config = dataclasses.replace(config, template=config.template or _told(hf_dir, model.text.model_type))
        prompt = prompt_settings(hf_dir, config, "llava_next", model.text.vocab_size)
        if prompt["tokenizer"].token_id(IMAGE) != model.image_token_id:
            raise ConfigError(
                f"{hf_dir}: config.json has image_token_index {model.image_token_id}, the tokenizer has "
                f"{prompt['tokenizer'].token_id(IMAGE)} for {IMAGE}"
            )
        return cls(
            **prompt,
            **pixels,
            image_token_id=model.image_token_id,
            anyres=model.anyres,
            alone=model.kind == "LlavaOnevision",
        )

    def plans(self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]) -> list[View]:
        if self.alone and len(sizes) > 1:
            return [View(0, 0, height, width) for width, height in sizes]
        return [self.anyres.view(*size) for size in sizes]

    def image_tokens(self, plan: View) -> int:
        return self.anyres.tokens(plan)

    def patches(self, plan: View) -> int:
        return (1 + plan.rows * plan.columns) * self.anyres.side**2

    def tiles(self, pixels: torch.Tensor) -> tuple[int, int]:
        return self.anyres.tile, min(4, pixels.shape[1] // pixels.shape[2])

    def views(self, image: Image.Image, plan: View, draw: Any) -> list[torch.Tensor]:
        """Pixels of an image's views, one below the other, bit for bit as transformers' ``*ImageProcessorPil``."""
        if not plan.rows:
            image = pad_to_square(image, tuple(int(value * 255) for value in self.mean))
        return [self.normalised(*self.anyres.cut(image, plan, self.resample))]

    def _sample(
        self, key: str, ids: torch.Tensor, labels: torch.Tensor, images: Any, plans: Any, draw: Any
    ) -> EncodedSample:
        return dataclasses.replace(super()._sample(key, ids, labels, images, plans, draw), grids=tuple(plans))

    def _placed(self, turn: Turn) -> Turn:
        """In LLaVA-OneVision's template the text of a question stands on a line of its own, with and without images."""
        turn = super()._placed(turn)
        if self.template.name != "onevision" or turn.role != "user" or IMAGE in turn.text:
            return turn
        return dataclasses.replace(turn, text=f"\n{turn.text}")


def _told(hf_dir: Path, decoder: str) -> str:
    """Name of the template of a folder; without one, that of the published models with such a decoder."""
    written = chat_template(hf_dir)
    if written is None:
        return {"mistral": "mistral", "qwen2": "onevision"}.get(decoder, "vicuna")
    bos, eos, _ = special_tokens(hf_dir).values()
    tokens = {"bos_token": bos or "", "eos_token": eos or ""}
    asked = render(written, [_QUESTION], hf_dir, add_generation_prompt=True, **tokens).removeprefix(bos or "")
    for name, form in TEMPLATES.items():
        for text in (f"{IMAGE}\na", f"{IMAGE}a"):
            if asked == "".join(piece.text for piece in form.pieces([Turn(role="user", text=text)], None, 0)):
                return name
    raise ConfigError(
        f"{hf_dir}: its chat template asks {asked!r}, as none of {', '.join(TEMPLATES)} does: set data.template to one of them"
    )


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return LlavaNextProcessor.from_pretrained(hf_dir, DataConfig(seq_length=2)).stop_ids
