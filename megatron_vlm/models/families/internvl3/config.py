"""Configuration of InternVL2 to 3.5, from either naming: ``internvl_chat`` (the original's) and ``internvl`` (transformers')."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.internlm2.config import internlm2_text_config
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.decoder import TextConfig, text_config
from megatron_vlm.models.parts.internvit import InternVitConfig
from megatron_vlm.models.processing.image_cost import ImageCost, projector_flops

_MAX_TILES = 12  # of an image where the data section does not say: InternVL's scripts
DECODERS = ("qwen2", "qwen3", "llama", "internlm2")  # of the original's naming
NAMINGS: dict[str, Literal["chat", "hf"]] = {"internvl_chat": "chat", "internvl": "hf"}


@dataclass(frozen=True, kw_only=True)
class InternVL3ModelConfig(Config):
    """The whole model.

    Attributes:
        text, vision: decoder and tower.
        shuffle: side of the block of patches that becomes one token.
        image_token_id: ``<IMG_CONTEXT>``; None: config.json does not say (the tokenizer does).
        layout: the naming of the checkpoint this was read from.
    """

    text: TextConfig
    vision: InternVitConfig
    shuffle: int
    image_token_id: int | None
    layout: Literal["chat", "hf"]

    def tile_tokens(self, size: int | None = None) -> int:
        """Tokens of a tile of ``size`` pixels a side (None: as the tower was trained)."""
        return ((size or self.vision.image_size) // self.vision.patch_size // self.shuffle) ** 2

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, n * s, s] of the largest image that ``data`` lets through: n tiles of side s."""
        tiles = 1 if data.dynamic_image_size is False else (data.max_dynamic_patch or _MAX_TILES)
        tiles += tiles > 1 and data.use_thumbnail is not False
        size = data.image_size or self.vision.image_size
        tiles = max(1, min(tiles, (data.seq_length - 1) // self.tile_tokens(size)))
        return self.vision.num_channels, tiles * size, size

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one image [C, n * s, s]."""
        tiles, side = image[1] // image[2], image[2] // self.vision.patch_size
        features, width = tiles * self.tile_tokens(image[2]), self.vision.hidden_size * self.shuffle**2
        return ImageCost(
            patches=tiles * side**2,
            segments=(side**2 + 1,) * tiles,
            features=features,
            connector=projector_flops(features, width, self.text.hidden_size),
        )

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "InternVL3ModelConfig":
        """Resolves a config.json's content.

        Raises:
            ConfigError: not InternVL's config, or a feature that is not built.
        """
        naming = NAMINGS.get(hf_config.get("model_type", ""))
        if naming is None:
            raise ConfigError(
                f"an InternVL config has model_type {' or '.join(NAMINGS)}, this one has {hf_config.get('model_type')!r}"
            )
        return _from_chat(hf_config) if naming == "chat" else _from_native(hf_config)


def _from_chat(hf: dict[str, Any]) -> InternVL3ModelConfig:
    require("ps_version", hf.get("ps_version", "v1"), "v2", "InternVL3")
    require("select_layer", hf.get("select_layer", -1), -1, "InternVL3")
    for name in ("use_backbone_lora", "use_llm_lora"):
        if hf.get(name):
            raise ConfigError(
                f"{name} {hf[name]}: merge the adapter into the weights first (the original's merge_lora.py)"
            )
    return InternVL3ModelConfig(
        text=_decoder(dict(hf.get("llm_config") or {})),
        vision=InternVitConfig.from_chat(hf.get("vision_config") or {}),
        shuffle=_shuffle(float(hf.get("downsample_ratio", 0.5))),
        image_token_id=None,
        layout="chat",
    )


def _decoder(llm: dict[str, Any]) -> TextConfig:
    from transformers import AutoConfig

    kind = llm.setdefault("model_type", "qwen2")
    if kind not in DECODERS:
        raise ConfigError(
            f"llm_config.model_type {kind!r} is not built for InternVL: one of {', '.join(DECODERS)} is needed"
        )
    return internlm2_text_config(llm) if kind == "internlm2" else text_config(AutoConfig.for_model(**llm))


def _from_native(content: dict[str, Any]) -> InternVL3ModelConfig:
    from transformers import InternVLConfig

    hf = InternVLConfig.from_dict(dict(content))
    for name, wanted in (
        ("projector_hidden_act", "gelu"), ("vision_feature_layer", -1), ("vision_feature_select_strategy", "default"),
    ):  # fmt: skip
        require(name, getattr(hf, name), wanted, "InternVL3")
    return InternVL3ModelConfig(
        text=text_config(hf.text_config, bool(hf.tie_word_embeddings)),
        vision=InternVitConfig.from_hf(hf.vision_config.to_dict()),
        shuffle=_shuffle(hf.downsample_ratio),
        image_token_id=hf.image_token_id,
        layout="hf",
    )


def _shuffle(ratio: float) -> int:
    factor = round(1 / ratio)
    if abs(factor * ratio - 1) > 1e-6:
        raise ConfigError(f"downsample_ratio {ratio} is not one over a whole number")
    return factor
