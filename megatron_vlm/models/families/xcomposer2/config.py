"""Configuration of InternLM-XComposer2, read from its config.json: transformers has no class for it, its own code is not run.

Much of the model stands in its code, not in its config.json: the tower (CLIP ViT-L/14), the rank and dropout of partial LoRA. A
config.json that has the keys ``vision_config``, ``plora_rank`` or ``plora_dropout`` overrides these (the tiny twins do).
"""

from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.internlm2.config import internlm2_text_config
from megatron_vlm.models.parts.clip import ClipConfig
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.processing.image_cost import ImageCost, projector_flops

MODEL_TYPES = ("internlmxcomposer2", "internlm")
_TOWER = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14, hidden_act="quick_gelu"
)  # fmt: skip
_TILE = 336
_HD_LENGTH = 16384


@dataclass(frozen=True, kw_only=True)
class XComposer2Config(Config):
    """One of the three published shapes.

    Attributes:
        text: the decoder.
        vision: the tower; its image size is that of one tile in the 4khd variant.
        hd: images become a global view and tiles (4khd-7b); else one square (7b, vl-7b).
        plora_rank, plora_dropout: of the branches for image tokens.
    """

    text: TextConfig
    vision: ClipConfig
    hd: bool
    plora_rank: int
    plora_dropout: float

    @property
    def variant(self) -> str:
        """Name of the published model of this shape."""
        return "4khd-7b" if self.hd else "7b" if self.vision.side == 16 else "vl-7b"

    @property
    def feature_size(self) -> int:
        """Width of what the projection reads: the 4khd variant joins 2 x 2 patches."""
        return self.vision.hidden_size * (4 if self.hd else 1)

    def tokens(self, rows: int = 1, columns: int = 1) -> int:
        """Tokens of one image; ``rows`` x ``columns`` is its grid of tiles in the 4khd variant."""
        side = self.vision.side
        if not self.hd:
            return side * side
        side //= 2
        return side * (side + 1) + 1 + rows * side * (columns * side + 1)

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, rows * S, columns * S] of the largest image that ``data`` lets through: as square as its tiles allow."""
        tiles = max(1, data.hd_num or 1) if self.hd else 1
        while tiles > 1 and self.tokens(int(tiles**0.5), tiles // int(tiles**0.5)) >= data.seq_length:
            tiles -= 1
        rows = int(tiles**0.5)
        size = self.vision.image_size
        return self.vision.num_channels, rows * size, tiles // rows * size

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one image [C, rows * S, columns * S]."""
        size, patches = self.vision.image_size, self.vision.side**2
        rows, columns = image[1] // size, image[2] // size
        views, features = 1 + rows * columns if self.hd else 1, self.tokens(rows, columns)
        return ImageCost(
            patches=views * patches,
            segments=(patches + 1,) * views,
            features=features,
            connector=projector_flops(features, self.feature_size, self.text.hidden_size),
        )

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "XComposer2Config":
        """Resolves a config.json's content.

        Without ``img_size`` the model is of the 4khd variant, whose config.json has none and a ``max_length`` of 16384.

        Raises:
            ConfigError: another model, a missing key, or a feature that is not built.
        """
        if hf_config.get("model_type") == "internlm" and "xcomposer2" not in str(hf_config.get("auto_map")).lower():
            raise ConfigError(
                "model_type 'internlm' is read where auto_map names InternLM-XComposer2's code, as in some of its releases; "
                "the first InternLM is not built"
            )
        text = internlm2_text_config(hf_config, model_types=MODEL_TYPES)
        if text.tie_word_embeddings:
            raise ConfigError("InternLM-XComposer2 with tie_word_embeddings true is not built")
        tower = {**_TOWER, **hf_config.get("vision_config", {})}
        hd = "img_size" not in hf_config or hf_config.get("max_length") == _HD_LENGTH
        size = tower.get("image_size", _TILE) if hd else hf_config["img_size"]
        vision = ClipConfig.from_hf({**tower, "image_size": size})
        if size % vision.patch_size or (hd and vision.side % 2):
            raise ConfigError(
                f"images of {size} pixels do not divide into {'pairs of ' if hd else ''}patches of {vision.patch_size}"
            )
        return cls(
            text=text,
            vision=vision,
            hd=hd,
            plora_rank=hf_config.get("plora_rank", 256),
            plora_dropout=hf_config.get("plora_dropout", 0.05),
        )
