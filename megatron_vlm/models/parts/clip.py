"""CLIP's vision tower, or SigLIP's over squares of one size, for any family: its config and its part of a weight map."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.tower import BOTH, TowerConfig, layer_entries, tower_sizes
from megatron_vlm.weights.mapping import Entry, direct

_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True, kw_only=True)
class ClipConfig(TowerConfig):
    """A CLIP vision tower.

    Attributes:
        siglip: SigLIP's: no class token, biases of the patch embedding, no norm before the layers.
        select_layer: hidden state that is used, as HF counts: -1 is the last layer's output, -2 the one before.
    """

    hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
    siglip: bool = False
    select_layer: int = -1

    def __post_init__(self) -> None:
        if not 1 <= self.num_run_layers <= self.num_layers:
            raise ConfigError(
                f"hidden state {self.select_layer} of a CLIP tower of {self.num_layers} layers does not exist"
            )

    @property
    def num_run_layers(self) -> int:
        """Layers that the selected hidden state needs."""
        return self.select_layer + self.num_layers + 1 if self.select_layer < 0 else self.select_layer

    @property
    def tokens(self) -> int:
        """That the layers see of an image: its patches, and the class token."""
        return self.side**2 + (not self.siglip)

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any], select_layer: int = -1) -> "ClipConfig":
        """Resolves the config of a CLIP or SigLIP vision model (``vision_config`` of a whole one).

        Raises:
            ConfigError: a feature that is not built.
        """
        from transformers import CLIPVisionConfig, SiglipVisionConfig

        siglip = vision.get("model_type") == "siglip_vision_model"
        hf = (SiglipVisionConfig if siglip else CLIPVisionConfig).from_dict(dict(vision))
        if siglip:
            require("vision_config.vision_use_head", getattr(hf, "vision_use_head", True), False)
        if hf.hidden_act not in _ACTIVATIONS:
            raise ConfigError(f"CLIP's hidden_act {hf.hidden_act!r} is not built: one of {', '.join(_ACTIVATIONS)} is")
        return cls(**tower_sizes(hf.to_dict()), hidden_act=hf.hidden_act, siglip=siglip, select_layer=select_layer)


def clip_entries(clip: ClipConfig, tp: int, hf: str, mg: str = "vision_model.") -> list[Entry]:
    """The tower's part of a weight map.

    Args:
        clip: the tower.
        tp: tensor parallel size, which decides whether it runs replicated.
        hf: prefix of the HF names, up to ``embeddings`` and ``encoder``.
        mg: prefix of ours.
    """
    entries = [
        direct(mg + "patch_embedding.weight", hf + "embeddings.patch_embedding.weight"),
        direct(mg + "position_embedding.weight", hf + "embeddings.position_embedding.weight"),
    ]
    if clip.siglip:
        entries.append(direct(mg + "patch_embedding.bias", hf + "embeddings.patch_embedding.bias"))
    else:
        entries.insert(0, direct(mg + "class_embedding", hf + "embeddings.class_embedding"))
        entries += [direct(f"{mg}pre_layernorm.{kind}", f"{hf}pre_layrnorm.{kind}") for kind in BOTH]  # HF's spelling
    run = clip.num_run_layers
    for i in range(clip.num_layers):
        own = f"encoder.layers.{i}." if i < run else f"unused_layers.{i - run}."
        entries += layer_entries(clip, tp, f"{hf}encoder.layers.{i}.", mg + own)
    entries += [direct(f"{mg}unused_layernorm.{kind}", f"{hf}post_layernorm.{kind}") for kind in BOTH]
    return entries
