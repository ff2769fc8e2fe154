"""Weight map of Qwen3-VL, whose names transformers has alike in files and in memory."""

from megatron_vlm.models.families.qwen3_vl.config import Qwen3VLConfig
from megatron_vlm.models.parts.decoder import check_tensor_parallel, llama_entries
from megatron_vlm.models.parts.qwen_vit import qwen3_vit_entries
from megatron_vlm.weights.mapping import Mapping


def qwen3_vl_mapping(config: Qwen3VLConfig, tp: int = 1) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    prefix = "model.language_model."
    tied = {"lm_head.weight": f"{prefix}embed_tokens.weight"} if config.text.tie_word_embeddings else {}
    return Mapping(
        entries=(*qwen3_vit_entries(config.vision, tp, "model.visual."), *llama_entries(config.text, prefix)),
        vocab_size=config.text.vocab_size,
        hf_tied=tied,
    )
