"""Weight map of InternLM-XComposer2 in its own key names: InternLM2's, a branch beside every linear, tower, projection."""

from megatron_vlm.models.families.internlm2.mapping import internlm2_entries
from megatron_vlm.models.families.xcomposer2.config import XComposer2Config
from megatron_vlm.models.parts.clip import clip_entries
from megatron_vlm.models.parts.decoder import TextConfig, check_tensor_parallel
from megatron_vlm.models.parts.partial_lora import branch_entries
from megatron_vlm.models.parts.projector import projector_entries
from megatron_vlm.weights.mapping import Entry, Mapping, direct

_TOWER = "vit.vision_tower.vision_model."
_LINEARS = {
    "self_attention.linear_qkv": ["attention.wqkv"],
    "self_attention.linear_proj": ["attention.wo"],
    "mlp.linear_fc1": ["feed_forward.w1", "feed_forward.w3"],
    "mlp.linear_fc2": ["feed_forward.w2"],
}


def xcomposer2_mapping(config: XComposer2Config, tp: int = 1) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    separators = [direct("connector.newline", "plora_sub_GN"), direct("connector.separator", "plora_glb_GN")]
    rotary = (f"model.layers.{i}.attention.rotary_emb.inv_freq" for i in range(config.text.num_layers))
    return Mapping(
        entries=(
            *clip_entries(config.vision, tp, _TOWER),
            *(separators if config.hd else []),
            *projector_entries("connector.projection.", ["vision_proj.0", "vision_proj.2"]),
            *internlm2_entries(config.text),
            *_branches(config.text),
        ),
        vocab_size=config.text.vocab_size,
        ignored=frozenset([_TOWER + "embeddings.position_ids", *rotary]),  # buffers in files of old versions
    )


def _branches(text: TextConfig) -> list[Entry]:
    entries = []
    for i in range(text.num_layers):
        for linear, names in _LINEARS.items():
            hf = [f"model.layers.{i}.{name}.Plora_" for name in names]
            entries += branch_entries(f"language_model.decoder.layers.{i}.{linear}", hf)
    return entries
