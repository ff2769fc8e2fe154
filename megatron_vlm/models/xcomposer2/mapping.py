"""Weight map of InternLM-XComposer2 in its own key names: InternLM2's, a branch beside every linear, tower, projection."""

from megatron_vlm.conversion.mapping import COLUMN, GATED, REPLICATED, ROW, Entry, Layout, Mapping, direct, gated
from megatron_vlm.layers.projector import projector_entries
from megatron_vlm.models.clip import clip_entries
from megatron_vlm.models.internlm2.mapping import internlm2_entries
from megatron_vlm.models.text import TextConfig, check_tensor_parallel
from megatron_vlm.models.xcomposer2.config import XComposer2Config

_TOWER = "vit.vision_tower.vision_model."


def xcomposer2_mapping(config: XComposer2Config, tp: int = 1, vocab_multiple: int = 1, vocab_extra: int = 0) -> Mapping:
    """Returns the map of a model; arguments as of the other families.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    vocab = Layout(dim=0, vocab_multiple=vocab_multiple, vocab_extra=vocab_extra)
    separators = [
        direct("connector.newline", "plora_sub_GN"),
        direct("connector.separator", "plora_glb_GN"),
    ]
    return Mapping(
        entries=(
            *clip_entries(config.vision, tp, _TOWER),
            *(separators if config.hd else []),
            *projector_entries("connector.projection.", ["vision_proj.0", "vision_proj.2"]),
            *internlm2_entries(config.text, vocab),
            *_branches(config.text),
        ),
        vocab_size=config.text.vocab_size,
        ignored=frozenset(
            [  # buffers in files of old versions
                _TOWER + "embeddings.position_ids",
                *(f"model.layers.{i}.attention.rotary_emb.inv_freq" for i in range(config.text.num_layers)),
            ]
        ),
    )


def _branches(text: TextConfig) -> list[Entry]:
    """Partial LoRA; the layouts are those of layers/partial_lora.py."""
    entries = []
    for i in range(text.num_layers):
        h, m = f"model.layers.{i}.", f"language_model.decoder.layers.{i}."
        fc1, gates = f"{m}mlp.linear_fc1.plora.", (f"{h}feed_forward.w1.Plora_", f"{h}feed_forward.w3.Plora_")
        entries += [
            gated(fc1 + "a", [f"{gate}A.weight" for gate in gates], REPLICATED),
            gated(fc1 + "b", [f"{gate}B.weight" for gate in gates], GATED),
        ]
        for own, name, a, b in (
            ("self_attention.linear_qkv", "attention.wqkv", REPLICATED, COLUMN),
            ("self_attention.linear_proj", "attention.wo", ROW, REPLICATED),
            ("mlp.linear_fc2", "feed_forward.w2", ROW, REPLICATED),
        ):
            entries.append(direct(f"{m}{own}.plora.a", f"{h}{name}.Plora_A.weight", a))
            entries.append(direct(f"{m}{own}.plora.b", f"{h}{name}.Plora_B.weight", b))
    return entries
