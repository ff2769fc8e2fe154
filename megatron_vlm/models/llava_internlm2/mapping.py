"""Weight maps of LLaVA: transformers' key names as files hold them, and the folders that XTuner writes."""

from megatron_vlm.conversion.mapping import Layout, Mapping
from megatron_vlm.layers.projector import projector_entries
from megatron_vlm.models.clip import clip_entries
from megatron_vlm.models.llava_internlm2.config import LlavaModelConfig
from megatron_vlm.models.text import check_tensor_parallel, llama_entries

TEXT, HEAD = "language_model.model.", "language_model.lm_head.weight"
VISION, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
_RENAMED = {  # spellings of transformers 5 in memory; its files have the older ones
    "model.language_model.": TEXT,
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": PROJECTOR,
    "lm_head": "language_model.lm_head",
}


def llava_mapping(config: LlavaModelConfig, tp: int = 1, vocab_multiple: int = 1, vocab_extra: int = 0) -> Mapping:
    """Returns the map of a model; arguments as of the other families.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    text = config.text
    check_tensor_parallel(text, tp)
    vocab = Layout(dim=0, vocab_multiple=vocab_multiple, vocab_extra=vocab_extra)
    entries = [
        *clip_entries(config.vision, tp, VISION),
        *projector_entries("connector.", [f"{PROJECTOR}linear_1", f"{PROJECTOR}linear_2"]),
        *llama_entries(text, vocab, TEXT, HEAD),
    ]
    rotary = (f"{TEXT}layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(text.num_layers))
    return Mapping(
        entries=tuple(entries),
        vocab_size=text.vocab_size,
        hf_tied={HEAD: f"{TEXT}embed_tokens.weight"} if text.tie_word_embeddings else {},
        ignored=frozenset([f"{VISION}embeddings.position_ids", *rotary]),  # buffers in files of old versions
        hf_aliases=file_name,
        module_name=module_name,
    )


def file_name(name: str) -> str:
    """The name of a tensor in the published files, given that or transformers 5's own."""
    for prefix, renamed in _RENAMED.items():
        if name.startswith(prefix):
            name = renamed + name.removeprefix(prefix)
    if name.startswith("vision_tower.") and not name.startswith(VISION):
        name = VISION + name.removeprefix("vision_tower.")
    return name


def module_name(name: str) -> str:
    """The inverse: the published name of a tensor, or of its module, -> transformers 5's in memory."""
    for memory, disk in _RENAMED.items():
        disk = VISION if disk == "vision_tower." else disk
        if name.startswith(disk):
            return memory + name.removeprefix(disk)
    return name
