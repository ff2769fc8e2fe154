"""Weight map of Idefics3 and SmolVLM: the module names here are those of ``model.py`` with global layer numbers."""

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.smolvlm.config import SmolVLMModelConfig
from megatron_vlm.models.parts.decoder import check_tensor_parallel, llama_entries
from megatron_vlm.models.parts.siglip import siglip_entries
from megatron_vlm.weights.mapping import ROW, Mapping, direct


def smolvlm_mapping(config: SmolVLMModelConfig, tp: int = 1) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``.

    Raises:
        ConfigError: decoder or connector cannot be cut into ``tp`` parts.
    """
    check_tensor_parallel(config.text, tp)
    if (width := config.vision.hidden_size * config.shuffle**2) % tp:
        raise ConfigError(f"tensor parallel size {tp} does not divide the connector's {width} features")
    linear = "connector.modality_projection."
    entries = [
        *siglip_entries(config.vision, tp, "model.vision_model."),
        direct(f"{linear}linear.weight", f"model.{linear}proj.weight", ROW),
        *llama_entries(config.text, "model.text_model."),
    ]
    tied = {"lm_head.weight": "model.text_model.embed_tokens.weight"} if config.text.tie_word_embeddings else {}
    return Mapping(entries=tuple(entries), vocab_size=config.text.vocab_size, hf_tied=tied)
