"""Weight map of InternLM2. Its fused ``wqkv`` has megatron-core's own order, so it is taken as it is.

Both hold, for each group of query heads, [q_0 .. q_{g-1}, k, v] x head_dim.
"""

from megatron_vlm.models.families.internlm2.config import InternLM2ModelConfig
from megatron_vlm.models.parts.decoder import TextConfig, check_tensor_parallel, llama_entries
from megatron_vlm.weights.mapping import COLUMN, ROW, VOCAB, Entry, Mapping, direct, gated


def internlm2_mapping(config: InternLM2ModelConfig, tp: int = 1) -> Mapping:
    """Returns the map of a model in InternLM2's own key names; arguments as of ``FamilySpec.mapping``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    text = config.text
    check_tensor_parallel(text, tp)
    tied = {"output.weight": "model.tok_embeddings.weight"} if text.tie_word_embeddings else {}
    return Mapping(
        entries=tuple(internlm2_entries(text)),
        vocab_size=text.vocab_size,
        hf_tied=tied,
        ignored=frozenset(f"model.layers.{i}.attention.rotary_emb.inv_freq" for i in range(text.num_layers)),
    )


def llama_mapping(config: InternLM2ModelConfig) -> Mapping:
    """The same full tensors as LlamaForCausalLM's: query, key and value apart."""
    text = config.text
    return Mapping(entries=tuple(llama_entries(text)), vocab_size=text.vocab_size)


def internlm2_entries(text: TextConfig, prefix: str = "") -> list[Entry]:
    """Weight map of an InternLM2 decoder, whose HF names begin with ``prefix``."""
    mg = "language_model."
    entries = [direct(mg + "embedding.word_embeddings.weight", f"{prefix}model.tok_embeddings.weight", VOCAB)]
    for i in range(text.num_layers):
        h, m = f"{prefix}model.layers.{i}.", f"{mg}decoder.layers.{i}."
        entries += [
            direct(m + "input_layernorm.weight", h + "attention_norm.weight"),
            direct(m + "self_attention.linear_qkv.weight", h + "attention.wqkv.weight", COLUMN),
            direct(m + "self_attention.linear_proj.weight", h + "attention.wo.weight", ROW),
            direct(m + "pre_mlp_layernorm.weight", h + "ffn_norm.weight"),
            gated(m + "mlp.linear_fc1.weight", [h + "feed_forward.w1.weight", h + "feed_forward.w3.weight"]),
            direct(m + "mlp.linear_fc2.weight", h + "feed_forward.w2.weight", ROW),
        ]
    entries.append(direct(mg + "decoder.final_layernorm.weight", f"{prefix}model.norm.weight"))
    if not text.tie_word_embeddings:
        entries.append(direct(mg + "output_layer.weight", f"{prefix}output.weight", VOCAB))
    return entries
