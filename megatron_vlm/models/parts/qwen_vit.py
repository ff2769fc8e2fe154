"""Qwen2.5-VL's vision tower and the merger behind it, for any family: config, costs, weight maps (``build.py`` builds them)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.tower import BOTH, LayerNames, TowerConfig, layer_entries
from megatron_vlm.models.processing.image_cost import ImageCost
from megatron_vlm.weights.mapping import COLUMN, ROW, Entry, direct

_EPSILON = 1e-6  # of all norms: transformers' code says so, no config does
_LAYER = LayerNames(
    norms=("norm1", "norm2"),
    qkv=("attn.qkv",),
    projection="attn.proj",
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True, kw_only=True)
class QwenVitConfig(TowerConfig):
    """The tower. ``image_size`` is a window's: positions are not learned.

    Attributes:
        temporal_patch_size: frames that a patch spans.
        block: side of the block of patches that becomes one token.
        window: side of a window, in blocks.
        full_layers: layers that attend to whole images; the others, within windows.
        rotary_base: of RoPE.
    """

    temporal_patch_size: int
    block: int
    window: int
    full_layers: tuple[int, ...]
    rotary_base: float

    @property
    def normalization(self) -> str:
        return "RMSNorm"

    @property
    def gated_mlp(self) -> bool:
        return True

    @property
    def patch_numbers(self) -> int:
        return super().patch_numbers * self.temporal_patch_size

    @property
    def num_window_layers(self) -> int:
        return self.num_layers - len(self.full_layers)

    @property
    def unit(self) -> int:
        """Pixels of a side of a block: images are of whole ones."""
        return self.patch_size * self.block

    def image_cost(self, image: tuple[int, int, int], hidden_size: int) -> ImageCost:
        """Cost of one image [C, H, W], with the merger to ``hidden_size``."""
        rows, columns = image[1] // self.unit, image[2] // self.unit
        width, features = self.hidden_size * self.block**2, rows * columns
        sides = [[min(self.window, count - i) for i in range(0, count, self.window)] for count in (rows, columns)]
        return ImageCost(
            patches=features * self.block**2,
            segments=(features * self.block**2,),
            windows=tuple(high * wide * self.block**2 for high in sides[0] for wide in sides[1]),
            features=features,
            connector=2.0 * features * width * (width + hidden_size),
        )

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any], hidden_size: int) -> "QwenVitConfig":
        """Reads the ``vision_config`` of a model whose decoder is ``hidden_size`` wide, with every default filled in.

        Raises:
            ConfigError: a feature that is not built, or sizes that contradict each other.
        """
        require("vision_config.hidden_act", vision["hidden_act"], "silu")
        require("vision_config.out_hidden_size", vision["out_hidden_size"], hidden_size)
        unit = vision["patch_size"] * vision["spatial_merge_size"]
        if vision["window_size"] % unit or vision["hidden_size"] // vision["num_heads"] % 4:
            raise ConfigError(
                f"vision_config.window_size {vision['window_size']} must be a multiple of {unit} (patch_size x "
                f"spatial_merge_size), and hidden_size {vision['hidden_size']} one of 4 x num_heads {vision['num_heads']}"
            )
        full = tuple(sorted({i for i in vision["fullatt_block_indexes"] if 0 <= i < vision["depth"]}))
        return cls(
            hidden_size=vision["hidden_size"],
            ffn_hidden_size=vision["intermediate_size"],
            num_layers=vision["depth"],
            num_attention_heads=vision["num_heads"],
            image_size=vision["window_size"],
            patch_size=vision["patch_size"],
            num_channels=vision["in_channels"],
            norm_epsilon=_EPSILON,
            temporal_patch_size=vision["temporal_patch_size"],
            block=vision["spatial_merge_size"],
            window=vision["window_size"] // unit,
            full_layers=full,
            rotary_base=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
        )


def qwen_vit_entries(vit: QwenVitConfig, tp: int, hf: str) -> list[Entry]:
    """The tower's and the merger's part of a weight map; ``hf`` stands before the HF names.

    Raises:
        ConfigError: the merger cannot be cut into ``tp`` parts.
    """
    if vit.hidden_size * vit.block**2 % tp:
        raise ConfigError(
            f"tensor parallel size {tp} does not divide the merger's {vit.hidden_size * vit.block**2} features"
        )
    mg, merger = "vision_model.", f"{hf}merger."
    entries = [direct(f"{mg}patch_embedding.weight", f"{hf}patch_embed.proj.weight")]
    for i in range(vit.num_layers):
        entries += layer_entries(vit, tp, f"{hf}blocks.{i}.", f"{mg}encoder.layers.{i}.", _LAYER, BOTH[:1])
    entries.append(direct("connector.norm.weight", f"{merger}ln_q.weight"))
    entries += [direct(f"connector.mlp.linear_fc1.{kind}", f"{merger}mlp.0.{kind}", COLUMN) for kind in BOTH]
    entries.append(direct("connector.mlp.linear_fc2.weight", f"{merger}mlp.2.weight", ROW))
    entries.append(direct("connector.mlp.linear_fc2.bias", f"{merger}mlp.2.bias"))
    return entries
