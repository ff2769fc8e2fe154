"""What vision transformers share: their sizes, an encoder over tensor parallel ranks, and its part of a weight map.

A tower for any family is a module beside this one (``clip.py``, ``internvit.py``, ``siglip.py``): its config, how it is built,
its weight map. Processors read the configs in worker processes, which never build: that is ``build.py``'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.weights.mapping import COLUMN, GATED, REPLICATED, ROW, Entry, direct, gated, qkv

BOTH = ("weight", "bias")
_HF_KEYS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "norm_epsilon": "layer_norm_eps",
}


@dataclass(frozen=True, kw_only=True)
class TowerConfig(Config):
    """A vision transformer.

    Attributes:
        image_size: side in pixels of the images that its positions were learned on.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    norm_epsilon: float

    @property
    def normalization(self) -> str:
        """Kind of the norms of its layers, as megatron-core calls it."""
        return "LayerNorm"

    @property
    def head_size(self) -> int:
        """Numbers of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def gated_mlp(self) -> bool:
        """The MLP of a layer is gated: it has a third linear."""
        return False

    @property
    def patch_numbers(self) -> int:
        """Numbers of one patch, as the patch embedding takes them."""
        return self.num_channels * self.patch_size**2

    @property
    def num_window_layers(self) -> int:
        """Layers that attend within windows of an image."""
        return 0

    @property
    def side(self) -> int:
        """Patches along one side of an image of ``image_size``."""
        return self.image_size // self.patch_size

    def sharded(self, tp: int) -> bool:
        """The tower is split over ``tp`` ranks (else it runs whole on each, as the 25 heads of InternViT-6B do)."""
        return self.num_attention_heads % tp == 0 and self.ffn_hidden_size % tp == 0


def tower_sizes(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``TowerConfig`` from HF's keys."""
    return {ours: vision[theirs] for ours, theirs in _HF_KEYS.items()}


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """HF names within a layer, those of CLIP and SigLIP unless given.

    ``qkv``: three tensors, or one of the three end to end; ``mlp``: two linears, or gate, up and down.
    """

    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    projection: str = "self_attn.out_proj"
    mlp: tuple[str, ...] = ("mlp.fc1", "mlp.fc2")


def layer_entries(
    tower: TowerConfig,
    tp: int,
    hf: str,
    mg: str,
    names: LayerNames | None = None,
    norm_kinds: Sequence[str] = BOTH,
    qkv_kinds: Sequence[str] = BOTH,
) -> list[Entry]:
    """Weight map of one layer of an encoder.

    Args:
        tower: it is of.
        tp: tensor parallel size, which decides whether the tower runs replicated.
        hf, mg: prefixes of the HF names and of ours.
        names: HF's.
        norm_kinds, qkv_kinds: what norms and the fused projection have.
    """
    names, heads = names or LayerNames(), tower.num_attention_heads
    column, row = (COLUMN, ROW) if tower.sharded(tp) else (REPLICATED, REPLICATED)
    norms = zip(("input_layernorm", "pre_mlp_layernorm"), names.norms)
    entries = [direct(f"{mg}{own}.{kind}", f"{hf}{name}.{kind}") for own, name in norms for kind in norm_kinds]
    for kind in qkv_kinds:
        fused, parts = f"{mg}self_attention.linear_qkv.{kind}", [f"{hf}{name}.{kind}" for name in names.qkv]
        entries.append(qkv(fused, parts, num_heads=heads, num_query_groups=heads, split=column))
    *into, out = names.mlp
    for kind in BOTH:
        fused, parts = f"{mg}mlp.linear_fc1.{kind}", [f"{hf}{name}.{kind}" for name in into]
        split = GATED if tower.sharded(tp) else REPLICATED
        entries.append(direct(fused, parts[0], column) if len(parts) == 1 else gated(fused, parts, split))
    for own, name in (("self_attention.linear_proj", names.projection), ("mlp.linear_fc2", out)):
        entries += [
            direct(f"{mg}{own}.weight", f"{hf}{name}.weight", row),
            direct(f"{mg}{own}.bias", f"{hf}{name}.bias"),
        ]
    return entries
