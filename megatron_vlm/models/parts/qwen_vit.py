"""Qwen's vision towers and the mergers behind them, for any family: config, costs, weight maps (``build.py`` builds them)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.parts.tower import BOTH, LayerNames, TowerConfig, layer_entries
from megatron_vlm.models.processing.image_cost import ImageCost
from megatron_vlm.weights.mapping import COLUMN, ROW, Entry, direct

_EPSILON = 1e-6  # of all norms: transformers' code says so, no config does
_LAYER = LayerNames(norms=("norm1", "norm2"), qkv=("attn.qkv",), projection="attn.proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class QwenVitConfig(TowerConfig):
    """What the towers share. ``image_size`` is that of learned positions, else a window's.

    Attributes:
        temporal_patch_size: frames that a patch spans.
        block: side of the block of patches that becomes one token.
        rotary_base: of RoPE.
    """

    temporal_patch_size: int
    block: int
    rotary_base: float

    @property
    def patch_numbers(self) -> int:
        return super().patch_numbers * self.temporal_patch_size

    @property
    def unit(self) -> int:
        """Pixels of a side of a block: images are of whole ones."""
        return self.patch_size * self.block

    @property
    def num_mergers(self) -> int:
        """Mergers behind it."""
        return 1

    def windows(self, rows: int, columns: int) -> tuple[int, ...]:
        """Patches of each window of an image of rows x columns blocks."""
        return ()

    def image_cost(self, image: tuple[int, int, int], hidden_size: int) -> ImageCost:
        """Cost of one image [C, H, W], with the mergers to ``hidden_size``."""
        rows, columns = image[1] // self.unit, image[2] // self.unit
        width, features = self.hidden_size * self.block**2, rows * columns
        return ImageCost(
            patches=features * self.block**2,
            segments=(features * self.block**2,),
            windows=self.windows(rows, columns),
            features=features,
            connector=2.0 * features * width * (width + hidden_size) * self.num_mergers,
        )


@dataclass(frozen=True, kw_only=True)
class Qwen25VitConfig(QwenVitConfig):
    """Qwen2.5-VL's tower.

    Attributes:
        window: side of a window, in blocks.
        full_layers: layers that attend to whole images; the others, within windows.
    """

    window: int
    full_layers: tuple[int, ...]

    @property
    def normalization(self) -> str:
        return "RMSNorm"

    @property
    def gated_mlp(self) -> bool:
        return True

    @property
    def num_window_layers(self) -> int:
        return self.num_layers - len(self.full_layers)

    def windows(self, rows: int, columns: int) -> tuple[int, ...]:
        sides = [[min(self.window, count - i) for i in range(0, count, self.window)] for count in (rows, columns)]
        return tuple(high * wide * self.block**2 for high in sides[0] for wide in sides[1])

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any], hidden_size: int) -> "Qwen25VitConfig":
        """Reads the ``vision_config`` of a model whose decoder is ``hidden_size`` wide, with every default filled in.

        Raises:
            ConfigError: a feature that is not built, or sizes that contradict each other.
        """
        unit = vision["patch_size"] * vision["spatial_merge_size"]
        if vision["window_size"] % unit:
            raise ConfigError(
                f"vision_config.window_size {vision['window_size']} must be a multiple of {unit} (patch_size x "
                "spatial_merge_size)"
            )
        return cls(
            **_sizes(vision, hidden_size, "silu"),
            image_size=vision["window_size"],
            window=vision["window_size"] // unit,
            full_layers=tuple(sorted({i for i in vision["fullatt_block_indexes"] if 0 <= i < vision["depth"]})),
        )


@dataclass(frozen=True, kw_only=True)
class Qwen3VitConfig(QwenVitConfig):
    """Qwen3-VL's tower.

    Attributes:
        levels: layers whose output becomes features too, for a decoder's first layers (DeepStack).
    """

    levels: tuple[int, ...]

    @property
    def num_mergers(self) -> int:
        return 1 + len(self.levels)

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any], hidden_size: int) -> "Qwen3VitConfig":
        """As ``Qwen25VitConfig.from_hf``."""
        side, levels = math.isqrt(vision["num_position_embeddings"]), tuple(vision["deepstack_visual_indexes"])
        if side**2 != vision["num_position_embeddings"]:
            raise ConfigError(
                f"vision_config.num_position_embeddings {vision['num_position_embeddings']} must be a square"
            )
        if list(levels) != sorted(set(levels) & set(range(vision["depth"]))):
            raise ConfigError(
                f"vision_config.deepstack_visual_indexes {list(levels)} must be layers of {vision['depth']}, in order"
            )
        sizes = _sizes(vision, hidden_size, "gelu_pytorch_tanh")
        return cls(**sizes, image_size=side * vision["patch_size"], levels=levels)


@dataclass(frozen=True, kw_only=True)
class QwenVLConfig(Config):
    """What the whole models share; ``image_token_id`` is that of ``<|image_pad|>``."""

    MAX_PIXELS: ClassVar[int]
    """Of an image, by the published models' processor files, where the data section does not say."""

    text: TextConfig
    vision: QwenVitConfig
    image_token_id: int

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, H, W] of the largest image that ``data`` lets through, near a square."""
        unit = self.vision.unit
        blocks = max(1, min((data.max_pixels or self.MAX_PIXELS) // unit**2, data.seq_length - 1))
        rows = math.isqrt(blocks)
        return self.vision.num_channels, rows * unit, blocks // rows * unit

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one image [C, H, W]."""
        return self.vision.image_cost(image, self.text.hidden_size)


def _sizes(vision: Mapping[str, Any], hidden_size: int, activation: str) -> dict[str, Any]:
    require("vision_config.hidden_act", vision["hidden_act"], activation)
    require("vision_config.out_hidden_size", vision["out_hidden_size"], hidden_size)
    if vision["hidden_size"] % vision["num_heads"] or vision["hidden_size"] // vision["num_heads"] % 4:
        raise ConfigError(
            f"vision_config.hidden_size {vision['hidden_size']} must be a multiple of 4 x num_heads {vision['num_heads']}"
        )
    return dict(
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_layers=vision["depth"],
        num_attention_heads=vision["num_heads"],
        patch_size=vision["patch_size"],
        num_channels=vision["in_channels"],
        norm_epsilon=_EPSILON,
        temporal_patch_size=vision["temporal_patch_size"],
        block=vision["spatial_merge_size"],
        rotary_base=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
    )


def qwen25_vit_entries(vit: Qwen25VitConfig, tp: int, hf: str) -> list[Entry]:
    """The tower's and the merger's part of a weight map; ``hf`` stands before the HF names.

    Raises:
        ConfigError: the merger cannot be cut into ``tp`` parts.
    """
    names = ("ln_q", "mlp.0", "mlp.2")
    return [
        *_tower_entries(vit, tp, hf, dataclasses.replace(_LAYER, mlp=_GATED), BOTH[:1]),
        *_merger_entries("connector.", f"{hf}merger.", names, BOTH[:1]),
    ]


def qwen3_vit_entries(vit: Qwen3VitConfig, tp: int, hf: str) -> list[Entry]:
    """The same of Qwen3-VL's tower and its mergers."""
    names = ("norm", "linear_fc1", "linear_fc2")
    layer = dataclasses.replace(_LAYER, mlp=("mlp.linear_fc1", "mlp.linear_fc2"))
    entries = _tower_entries(vit, tp, hf, layer, BOTH)
    entries.append(direct("vision_model.patch_embedding.bias", f"{hf}patch_embed.proj.bias"))
    entries.append(direct("vision_model.position_embedding.weight", f"{hf}pos_embed.weight"))
    entries += _merger_entries("connector.", f"{hf}merger.", names, BOTH)
    for i in range(len(vit.levels)):
        entries += _merger_entries(f"connector.levels.{i}.", f"{hf}deepstack_merger_list.{i}.", names, BOTH)
    return entries


def _tower_entries(vit: QwenVitConfig, tp: int, hf: str, layer: LayerNames, norm_kinds: Sequence[str]) -> list[Entry]:
    if vit.hidden_size * vit.block**2 % tp:
        raise ConfigError(
            f"tensor parallel size {tp} does not divide the merger's {vit.hidden_size * vit.block**2} features"
        )
    entries = [direct("vision_model.patch_embedding.weight", f"{hf}patch_embed.proj.weight")]
    for i in range(vit.num_layers):
        entries += layer_entries(vit, tp, f"{hf}blocks.{i}.", f"vision_model.encoder.layers.{i}.", layer, norm_kinds)
    return entries


def _merger_entries(mg: str, hf: str, names: tuple[str, str, str], norm_kinds: Sequence[str]) -> list[Entry]:
    norm, into, out = names
    return [
        *(direct(f"{mg}norm.{kind}", f"{hf}{norm}.{kind}") for kind in norm_kinds),
        *(direct(f"{mg}mlp.linear_fc1.{kind}", f"{hf}{into}.{kind}", COLUMN) for kind in BOTH),
        direct(f"{mg}mlp.linear_fc2.weight", f"{hf}{out}.weight", ROW),
        direct(f"{mg}mlp.linear_fc2.bias", f"{hf}{out}.bias"),
    ]
