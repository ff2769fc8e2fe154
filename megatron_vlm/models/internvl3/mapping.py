"""Weight map of InternVL3 in both of its layouts: the same full tensors, under the original's or transformers' names."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vlm.conversion.mapping import COLUMN, REPLICATED, ROW, Entry, Layout, Mapping, direct, qkv
from megatron_vlm.layers.projector import projector_entries
from megatron_vlm.models.internvl3.config import InternVL3ModelConfig
from megatron_vlm.models.text import check_tensor_parallel, llama_entries


@dataclass(frozen=True, kw_only=True)
class Names:
    """HF names of the tower and the connector in one layout; those of a layer stand behind ``layers`` and its number."""

    class_embedding: str
    patch_embedding: str
    position_embedding: str
    layers: str
    norms: tuple[str, str]
    scales: tuple[str, str]
    qkv: tuple[str, ...]
    qk_norms: tuple[str, str]
    projection: str
    linears: tuple[str, str]
    norm: str


NAMES = {
    "chat": Names(
        class_embedding="vision_model.embeddings.class_embedding",
        patch_embedding="vision_model.embeddings.patch_embedding",
        position_embedding="vision_model.embeddings.position_embedding",
        layers="vision_model.encoder.layers.",
        norms=("norm1", "norm2"),
        scales=("ls1", "ls2"),
        qkv=("attn.qkv",),
        qk_norms=("attn.q_norm", "attn.k_norm"),
        projection="attn.proj",
        linears=("mlp1.1", "mlp1.3"),
        norm="mlp1.0",
    ),
    "hf": Names(
        class_embedding="vision_tower.embeddings.cls_token",
        patch_embedding="vision_tower.embeddings.patch_embeddings.projection",
        position_embedding="vision_tower.embeddings.position_embeddings",
        layers="vision_tower.encoder.layer.",
        norms=("layernorm_before", "layernorm_after"),
        scales=("lambda_1", "lambda_2"),
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        qk_norms=("attention.q_norm", "attention.k_norm"),
        projection="attention.projection_layer",
        linears=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
        norm="multi_modal_projector.layer_norm",
    ),
}
_IN_MEMORY = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head", "language_model.lm_head"),
)


def file_name(name: str) -> str:
    """transformers' name of a tensor in memory -> in its files."""
    for memory, disk in _IN_MEMORY:
        if name.startswith(memory):
            return disk + name.removeprefix(memory)
    return name


def module_name(name: str) -> str:
    """The inverse: transformers' name of a tensor, or of its module, in its files -> in memory."""
    for memory, disk in _IN_MEMORY:
        if name.startswith(disk):
            return memory + name.removeprefix(disk)
    return name


def internvl3_mapping(
    config: InternVL3ModelConfig, tp: int = 1, vocab_multiple: int = 1, vocab_extra: int = 0, layout: str | None = None
) -> Mapping:
    """Returns the map of a model.

    Args:
        config: the model.
        tp: tensor parallel size, which decides whether the tower runs replicated.
        vocab_multiple, vocab_extra: padding of the vocabulary.
        layout: of the HF names, ``chat`` or ``hf``; None: the model's own.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    vocab = Layout(dim=0, vocab_multiple=vocab_multiple, vocab_extra=vocab_extra)
    names = NAMES[layout or config.layout]
    entries = [
        *_vision(config, names, tp),
        *projector_entries("connector.", names.linears, names.norm),
        *llama_entries(config.text, vocab, "language_model.model.", "language_model.lm_head.weight"),
    ]
    tied = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    return Mapping(
        entries=tuple(entries),
        vocab_size=config.text.vocab_size,
        hf_tied=tied if config.text.tie_word_embeddings else {},
        hf_aliases=file_name,
        module_name=module_name if names is NAMES["hf"] else str,
    )


def _vision(config: InternVL3ModelConfig, names: Names, tp: int) -> list[Entry]:
    vision, mg = config.vision, "vision_model."
    column, row = (COLUMN, ROW) if config.vision_sharded(tp) else (REPLICATED, REPLICATED)
    both = ("weight", "bias")
    entries = [
        direct(mg + "class_embedding", names.class_embedding),
        direct(mg + "position_embedding", names.position_embedding),
        *(direct(f"{mg}patch_embedding.{kind}", f"{names.patch_embedding}.{kind}") for kind in both),
    ]
    for i in range(vision.num_layers):
        h, m = f"{names.layers}{i}.", f"{mg}encoder.layers.{i}."
        norms = zip(("input_layernorm", "pre_mlp_layernorm"), names.norms)
        kinds = both if vision.norm_type == "layer_norm" else both[:1]
        entries += [direct(f"{m}{own}.{kind}", f"{h}{name}.{kind}") for own, name in norms for kind in kinds]
        residuals = zip(("self_attn_bda", "mlp_bda"), names.scales)
        entries += [direct(f"{m}{own}.scale", f"{h}{name}") for own, name in residuals]
        for kind in both if vision.qkv_bias else both[:1]:
            hf = [f"{h}{name}.{kind}" for name in names.qkv]
            entries.append(_qkv(f"{m}self_attention.linear_qkv.{kind}", hf, vision.num_attention_heads, column))
        if vision.qk_norm:
            for own, name in zip(("q_layernorm", "k_layernorm"), names.qk_norms):
                entries.append(direct(f"{m}self_attention.{own}.weight", f"{h}{name}.weight", column))
        entries += [direct(f"{m}mlp.linear_fc1.{kind}", f"{h}mlp.fc1.{kind}", column) for kind in both]
        for own, name in (("self_attention.linear_proj", names.projection), ("mlp.linear_fc2", "mlp.fc2")):
            entries.append(direct(f"{m}{own}.weight", f"{h}{name}.weight", row))
            entries.append(direct(f"{m}{own}.bias", f"{h}{name}.bias"))
    return entries


def _qkv(name: str, hf: Sequence[str], num_heads: int, layout: Layout) -> Entry:
    """Queries, keys and values as three HF tensors, or as one with the three end to end (not head by head)."""
    entry = qkv(name, hf, num_heads=num_heads, num_query_groups=num_heads, layout=layout)
    if len(hf) == 3:
        return entry
    return dataclasses.replace(
        entry,
        to_full=lambda tensors: entry.to_full(tensors[0].chunk(3)),
        from_full=lambda full: [torch.cat(entry.from_full(full))],
    )
