"""Configuration of InternVL3, from either of its layouts: ``internvl_chat`` (the original's) and ``internvl`` (transformers')."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.image_cost import ImageCost, projector_flops
from megatron_vlm.models.text import TextConfig, text_config

_MAX_TILES = 12  # of an image where the data section does not say: InternVL's scripts
LAYOUTS: dict[str, Literal["chat", "hf"]] = {"internvl_chat": "chat", "internvl": "hf"}
# Defaults of the original's InternVisionConfig, for keys that a config.json leaves out.
CHAT_VISION = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Config):
    """InternViT.

    Attributes:
        image_size: side in pixels of the tile that the positions were learned on.
        norm_type: of the norms before attention and MLP.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are RMS-normed over all heads together.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    norm_type: Literal["layer_norm", "rms_norm"]
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool

    @property
    def side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class InternVL3ModelConfig(Config):
    """The whole model.

    Attributes:
        text, vision: decoder and tower.
        shuffle: side of the block of patches that becomes one token.
        image_token_id: ``<IMG_CONTEXT>``; None: config.json does not say (the tokenizer does).
        layout: of the HF names of the checkpoint this was read from.
    """

    text: TextConfig
    vision: VisionConfig
    shuffle: int
    image_token_id: int | None
    layout: Literal["chat", "hf"]

    def vision_sharded(self, tp: int) -> bool:
        """The tower is split over ``tp`` ranks (else it runs whole on each, as the 25 heads of the 6B one do)."""
        return self.vision.num_attention_heads % tp == 0 and self.vision.ffn_hidden_size % tp == 0

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
        layout = LAYOUTS.get(hf_config.get("model_type", ""))
        if layout is None:
            raise ConfigError(
                f"an InternVL config has model_type {' or '.join(LAYOUTS)}, this one has {hf_config.get('model_type')!r}"
            )
        return _from_chat(hf_config) if layout == "chat" else _from_native(hf_config)


def _from_chat(hf: dict[str, Any]) -> InternVL3ModelConfig:
    from transformers import Qwen2Config

    llm = dict(hf.get("llm_config") or {})
    if llm.get("model_type", "qwen2") != "qwen2":
        raise ConfigError(f"llm_config.model_type {llm['model_type']!r} is not built for InternVL3: only qwen2 is")
    vision = {**CHAT_VISION, **(hf.get("vision_config") or {})}
    _check("ps_version", hf.get("ps_version", "v1"), "v2")
    _check("select_layer", hf.get("select_layer", -1), -1)
    for name in ("use_backbone_lora", "use_llm_lora"):
        if hf.get(name):
            raise ConfigError(
                f"{name} {hf[name]}: merge the adapter into the weights first (the original's merge_lora.py)"
            )
    return InternVL3ModelConfig(
        text=text_config(Qwen2Config.from_dict(llm)),
        vision=_vision(vision, qkv_bias=bool(vision["qkv_bias"]), qk_norm=bool(vision["qk_normalization"])),
        shuffle=_shuffle(float(hf.get("downsample_ratio", 0.5))),
        image_token_id=None,
        layout="chat",
    )


def _from_native(content: dict[str, Any]) -> InternVL3ModelConfig:
    from transformers import InternVLConfig

    hf = InternVLConfig.from_dict(dict(content))
    vision = hf.vision_config
    for name, value, wanted in (
        ("projector_hidden_act", hf.projector_hidden_act, "gelu"),
        ("vision_feature_layer", hf.vision_feature_layer, -1),
        ("vision_feature_select_strategy", hf.vision_feature_select_strategy, "default"),
        ("vision_config.use_mask_token", vision.use_mask_token, False),
        ("vision_config.use_absolute_position_embeddings", vision.use_absolute_position_embeddings, True),
        ("vision_config.use_mean_pooling", vision.use_mean_pooling, True),
    ):
        _check(name, value, wanted)
    sizes = {name: getattr(vision, name) for name in ("image_size", "patch_size")}
    for name, (height, width) in sizes.items():
        if height != width:
            raise ConfigError(f"vision_config.{name} {height} x {width} is not square, which is not built")
    values = {**vision.to_dict(), **{name: size[0] for name, size in sizes.items()}}
    return InternVL3ModelConfig(
        text=text_config(hf.text_config, bool(hf.tie_word_embeddings)),
        vision=_vision(values, qkv_bias=vision.attention_bias, qk_norm=vision.use_qk_norm),
        shuffle=_shuffle(hf.downsample_ratio),
        image_token_id=hf.image_token_id,
        layout="hf",
    )


def _vision(values: dict[str, Any], qkv_bias: bool, qk_norm: bool) -> VisionConfig:
    _check("vision_config.hidden_act", values["hidden_act"], "gelu")
    return VisionConfig(
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        num_channels=values["num_channels"],
        norm_type=values["norm_type"],
        norm_epsilon=values["layer_norm_eps"],
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def _shuffle(ratio: float) -> int:
    factor = round(1 / ratio)
    if abs(factor * ratio - 1) > 1e-6:
        raise ConfigError(f"downsample_ratio {ratio} is not one over a whole number")
    return factor


def _check(name: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise ConfigError(f"{name} {value!r} is not built for InternVL3: only {wanted!r} is")
