"""Weight map of Idefics2: the module names here are those of ``model.py`` with global layer numbers."""

from megatron_vlm.models.families.idefics2.config import Idefics2ModelConfig
from megatron_vlm.models.parts.decoder import check_tensor_parallel, llama_entries
from megatron_vlm.models.parts.perceiver import perceiver_entries
from megatron_vlm.models.parts.siglip import siglip_entries
from megatron_vlm.weights.mapping import ROW, Mapping, direct, gated


def idefics2_mapping(config: Idefics2ModelConfig, tp: int = 1) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    hf, mg = "model.connector.modality_projection.", "connector.modality_projection."
    resampler = "connector.perceiver_resampler."
    entries = [
        *siglip_entries(config.vision, tp, "model.vision_model."),
        gated(mg + "linear_fc1.weight", [hf + "gate_proj.weight", hf + "up_proj.weight"]),
        direct(mg + "linear_fc2.weight", hf + "down_proj.weight", ROW),
        *perceiver_entries(config.perceiver, tp, f"model.{resampler}", resampler),
        *llama_entries(config.text, "model.text_model."),
    ]
    tied = {"lm_head.weight": "model.text_model.embed_tokens.weight"} if config.text.tie_word_embeddings else {}
    rotary = (f"model.text_model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.text.num_layers))
    return Mapping(
        entries=tuple(entries),
        vocab_size=config.text.vocab_size,
        hf_tied=tied,
        ignored=frozenset(["model.vision_model.embeddings.position_ids", *rotary]),  # buffers in files of old versions
    )
