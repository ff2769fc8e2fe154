"""Weight map of Qwen2.5-VL: the names of the published files, which transformers renames in memory."""

from megatron_vlm.models.families.qwen2_5_vl.config import Qwen25VLConfig
from megatron_vlm.models.parts.decoder import check_tensor_parallel, llama_entries
from megatron_vlm.models.parts.qwen_vit import qwen25_vit_entries
from megatron_vlm.weights.mapping import Mapping, Prefixes

NAMES = Prefixes((("model.language_model.", "model."), ("model.visual.", "visual.")))


def qwen2_5_vl_mapping(config: Qwen25VLConfig, tp: int = 1) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.text.tie_word_embeddings else {}
    return Mapping(
        entries=(*qwen25_vit_entries(config.vision, tp, "visual."), *llama_entries(config.text)),
        vocab_size=config.text.vocab_size,
        hf_tied=tied,
        hf_aliases=NAMES.file_name,
        module_name=NAMES.module_name,
    )
