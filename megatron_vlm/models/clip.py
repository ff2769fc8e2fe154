"""CLIP's vision tower for any family: its config, how it is built over tensor parallel ranks, its part of a weight map."""

import typing
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.config import Config
from megatron_vlm.conversion.mapping import COLUMN, REPLICATED, ROW, Entry, direct, qkv
from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel.topology import Topology

if typing.TYPE_CHECKING:
    from megatron_vlm.layers.vision.clip import ClipVisionModel

_ACTIVATIONS = ("quick_gelu", "gelu")


@dataclass(frozen=True, kw_only=True)
class ClipConfig(Config):
    """A CLIP vision tower.

    Attributes:
        select_layer: hidden state that is used, as HF counts: -1 is the last layer's output, -2 the one before.
    """

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    norm_epsilon: float
    hidden_act: Literal["quick_gelu", "gelu"]
    select_layer: int = -1

    def __post_init__(self) -> None:
        if not 1 <= self.num_run_layers <= self.num_layers:
            raise ConfigError(
                f"hidden state {self.select_layer} of a CLIP tower of {self.num_layers} layers does not exist"
            )

    @property
    def side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_run_layers(self) -> int:
        """Layers that the selected hidden state needs."""
        return self.select_layer + self.num_layers + 1 if self.select_layer < 0 else self.select_layer

    def sharded(self, tp: int) -> bool:
        """The tower is split over ``tp`` ranks (else it runs whole on each)."""
        return self.num_attention_heads % tp == 0 and self.ffn_hidden_size % tp == 0

    @classmethod
    def from_hf(cls, vision: dict[str, Any], select_layer: int = -1) -> "ClipConfig":
        """Resolves the config of a CLIP vision model (``vision_config`` of a whole CLIP).

        Raises:
            ConfigError: a feature that is not built.
        """
        from transformers import CLIPVisionConfig

        hf = CLIPVisionConfig.from_dict(dict(vision))
        if hf.hidden_act not in _ACTIVATIONS:
            raise ConfigError(f"CLIP's hidden_act {hf.hidden_act!r} is not built: one of {', '.join(_ACTIVATIONS)} is")
        return cls(
            hidden_size=hf.hidden_size,
            ffn_hidden_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_attention_heads=hf.num_attention_heads,
            image_size=hf.image_size,
            patch_size=hf.patch_size,
            num_channels=hf.num_channels,
            norm_epsilon=hf.layer_norm_eps,
            hidden_act=hf.hidden_act,
            select_layer=select_layer,
        )


def build_clip(
    clip: ClipConfig, topology: Topology, options: Any, tower: "type[ClipVisionModel] | None" = None
) -> "ClipVisionModel":
    """The tower (of a subclass ``tower``, if given); whole on every rank where its heads do not divide."""
    # Processors read the config in worker processes, which never build: megatron-core is imported here.
    import torch.nn.functional as F
    from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

    from megatron_vlm.layers.norm import LayerNorm
    from megatron_vlm.layers.vision.clip import ClipVisionModel, quick_gelu
    from megatron_vlm.models.language import layer_spec, process_groups, transformer_config

    solo = not clip.sharded(topology.tp)
    mcore = transformer_config(
        topology,
        options,
        decoder=False,
        tp=1 if solo else None,
        num_layers=clip.num_layers,
        hidden_size=clip.hidden_size,
        ffn_hidden_size=clip.ffn_hidden_size,
        num_attention_heads=clip.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=clip.norm_epsilon,
        activation_func=quick_gelu if clip.hidden_act == "quick_gelu" else F.gelu,
        add_bias_linear=True,
    )
    spec = TransformerBlockSubmodules(
        layer_specs=[layer_spec(LayerNorm, causal=False)] * clip.num_layers, layer_norm=LayerNorm
    )
    encoder = TransformerBlock(mcore, spec, post_layer_norm=False, pg_collection=process_groups(solo))
    return (tower or ClipVisionModel)(
        encoder,
        num_run_layers=clip.num_run_layers,
        config=mcore,
        patch_size=clip.patch_size,
        num_channels=clip.num_channels,
        side=clip.side,
    )


def clip_entries(clip: ClipConfig, tp: int, hf: str, mg: str = "vision_model.") -> list[Entry]:
    """The tower's part of a weight map.

    Args:
        clip: the tower.
        tp: tensor parallel size, which decides whether it runs replicated.
        hf: prefix of the HF names, up to ``embeddings`` and ``encoder``.
        mg: prefix of ours.
    """
    column, row = (COLUMN, ROW) if clip.sharded(tp) else (REPLICATED, REPLICATED)
    kinds = ("weight", "bias")
    entries = [
        direct(mg + "class_embedding", hf + "embeddings.class_embedding"),
        direct(mg + "patch_embedding.weight", hf + "embeddings.patch_embedding.weight"),
        direct(mg + "position_embedding.weight", hf + "embeddings.position_embedding.weight"),
        *(direct(f"{mg}pre_layernorm.{kind}", f"{hf}pre_layrnorm.{kind}") for kind in kinds),  # HF's spelling
    ]
    heads, run = clip.num_attention_heads, clip.num_run_layers
    for i in range(clip.num_layers):
        h, m = f"{hf}encoder.layers.{i}.", mg + (f"encoder.layers.{i}." if i < run else f"unused_layers.{i - run}.")
        for kind in kinds:
            names = [f"{h}self_attn.{x}_proj.{kind}" for x in "qkv"]
            fused = f"{m}self_attention.linear_qkv.{kind}"
            entries += [
                direct(f"{m}input_layernorm.{kind}", f"{h}layer_norm1.{kind}"),
                qkv(fused, names, num_heads=heads, num_query_groups=heads, layout=column),
                direct(f"{m}pre_mlp_layernorm.{kind}", f"{h}layer_norm2.{kind}"),
                direct(f"{m}mlp.linear_fc1.{kind}", f"{h}mlp.fc1.{kind}", column),
            ]
        for own, name in (("self_attention.linear_proj", "self_attn.out_proj"), ("mlp.linear_fc2", "mlp.fc2")):
            entries.append(direct(f"{m}{own}.weight", f"{h}{name}.weight", row))
            entries.append(direct(f"{m}{own}.bias", f"{h}{name}.bias"))
    entries += [direct(f"{mg}unused_layernorm.{kind}", f"{hf}post_layernorm.{kind}") for kind in kinds]
    return entries
