"""Weight map of Gemma 3: the names of the published files, which transformers renames in memory."""

from megatron_vlm.models.families.gemma3.config import Gemma3ModelConfig
from megatron_vlm.models.parts.decoder import check_tensor_parallel, llama_entries
from megatron_vlm.models.parts.siglip import siglip_entries
from megatron_vlm.weights.mapping import Mapping, Prefixes, direct

TEXT, HEAD = "language_model.model.", "language_model.lm_head.weight"
VISION, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
NAMES = Prefixes(  # spellings of transformers 5 in memory; the published files have the older ones
    (
        ("model.vision_tower.", VISION),
        ("model.vision_tower.vision_model.", VISION),
        (VISION, VISION),
        ("vision_tower.", VISION),
        ("model.language_model.", TEXT),
        ("model.multi_modal_projector.", PROJECTOR),
        ("lm_head", "language_model.lm_head"),
    )
)


def gemma3_mapping(config: Gemma3ModelConfig, tp: int = 1) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    entries = [
        *siglip_entries(config.vision, tp, VISION),
        direct("connector.norm.weight", f"{PROJECTOR}mm_soft_emb_norm.weight"),
        direct("connector.projection", f"{PROJECTOR}mm_input_projection_weight"),
        *llama_entries(config.text, TEXT, HEAD),
    ]
    return Mapping(
        entries=tuple(entries),
        vocab_size=config.text.vocab_size,
        hf_tied={HEAD: f"{TEXT}embed_tokens.weight"} if config.text.tie_word_embeddings else {},
        hf_aliases=NAMES.file_name,
        module_name=NAMES.module_name,
    )
