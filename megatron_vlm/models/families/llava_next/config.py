"""Configuration of LLaVA-NeXT and LLaVA-OneVision, resolved from an HF config.json through transformers' own config classes."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.anyres import AnyRes, View, anyres, column
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.clip import ClipConfig
from megatron_vlm.models.parts.decoder import TextConfig, text_config
from megatron_vlm.models.processing.image_cost import ImageCost, projector_flops

KINDS: dict[str, Literal["LlavaNext", "LlavaOnevision"]] = {
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
}
"""model_type -> how transformers' classes are called."""
_STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # without a class token all is features


@dataclass(frozen=True, kw_only=True)
class LlavaNextModelConfig(Config):
    """The whole model.

    Attributes:
        text, vision: decoder and tower.
        anyres: sizes that images may take.
        image_token_id: marks the positions that image features overwrite.
        kind: transformers' classes of the model.
    """

    text: TextConfig
    vision: ClipConfig
    anyres: AnyRes
    image_token_id: int
    kind: Literal["LlavaNext", "LlavaOnevision"]

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, views * S, S] of the largest image that ``data`` lets through."""
        size = self.vision.image_size
        views = sorted({1 + height * width // size**2 for height, width in self.anyres.sizes})
        fits = [number for number in views if self.anyres.tokens(column(number)) < data.seq_length]
        return self.vision.num_channels, max(fits, default=views[0]) * size, size

    def image_cost(self, image: tuple[int, int, int], grid: tuple[int, ...] = ()) -> ImageCost:
        """Cost of one image [C, views * S, S]; without its View in ``grid`` the features are the most that it may have."""
        views, patches = image[1] // image[2], self.vision.side**2
        return ImageCost(
            patches=views * patches,
            segments=(self.vision.tokens,) * views,
            features=self.anyres.tokens(View(*grid) if grid else column(views)),
            connector=projector_flops(views * patches, self.vision.hidden_size, self.text.hidden_size),
        )

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "LlavaNextModelConfig":
        """Resolves a config.json's content; transformers fills in the defaults, nothing is assumed here.

        Raises:
            ConfigError: another model's config, or a feature that is not built.
        """
        import transformers

        kind = KINDS.get(hf_config.get("model_type", ""))
        if kind is None:
            raise ConfigError(f"model_type must be {' or '.join(KINDS)}, this one has {hf_config.get('model_type')!r}")
        hf = getattr(transformers, f"{kind}Config").from_dict(dict(hf_config))
        tower, layer = hf.vision_config.model_type, hf.vision_feature_layer
        if tower not in _STRATEGIES:
            raise ConfigError(f"vision_config.model_type {tower!r} is not built: one of {', '.join(_STRATEGIES)} is")
        require("vision_feature_select_strategy", hf.vision_feature_select_strategy, _STRATEGIES[tower])
        require("projector_hidden_act", hf.projector_hidden_act, "gelu")
        require("multimodal_projector_bias", hf.multimodal_projector_bias, True)
        if not isinstance(layer, int):
            raise ConfigError(f"vision_feature_layer {layer!r} is not built: only one layer is")
        vision = ClipConfig.from_hf(hf.vision_config.to_dict(), select_layer=layer)
        return cls(
            text=text_config(hf.text_config, tie_word_embeddings=hf.tie_word_embeddings),
            vision=vision,
            anyres=anyres(hf, vision.image_size, vision.side),
            image_token_id=hf.image_token_id,
            kind=kind,
        )
