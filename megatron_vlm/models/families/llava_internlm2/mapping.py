"""Weight maps of LLaVA: transformers' key names as files hold them, and the folders that XTuner writes."""

from typing import Any

from megatron_vlm.models.parts.clip import clip_entries
from megatron_vlm.models.parts.decoder import check_tensor_parallel, llama_entries
from megatron_vlm.models.parts.projector import projector_entries
from megatron_vlm.weights.mapping import Mapping, Prefixes

TEXT, HEAD = "language_model.model.", "language_model.lm_head.weight"
VISION, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
NAMES = Prefixes(  # spellings of transformers 5 in memory; its files have the older ones
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


def llava_mapping(config: Any, tp: int = 1) -> Mapping:
    """Returns the map of a model; arguments as of ``FamilySpec.mapping``, the config of any LLaVA: ``text`` and ``vision``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    text = config.text
    check_tensor_parallel(text, tp)
    entries = [
        *clip_entries(config.vision, tp, VISION),
        *projector_entries("connector.", [f"{PROJECTOR}linear_1", f"{PROJECTOR}linear_2"]),
        *llama_entries(text, TEXT, HEAD),
    ]
    rotary = (f"{TEXT}layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(text.num_layers))
    return Mapping(
        entries=tuple(entries),
        vocab_size=text.vocab_size,
        hf_tied={HEAD: f"{TEXT}embed_tokens.weight"} if text.tie_word_embeddings else {},
        ignored=frozenset([f"{VISION}embeddings.position_ids", *rotary]),  # buffers in files of old versions
        hf_aliases=NAMES.file_name,
        module_name=NAMES.module_name,
    )
