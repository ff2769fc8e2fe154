"""Weight map of Idefics2: the module names here are those of ``model.py`` with global layer numbers."""

from megatron_vlm.conversion.mapping import COLUMN, GATED, REPLICATED, ROW, Entry, Layout, Mapping, direct, gated, qkv
from megatron_vlm.models.idefics2.config import Idefics2ModelConfig
from megatron_vlm.models.text import check_tensor_parallel, llama_entries


def idefics2_mapping(
    config: Idefics2ModelConfig, tp: int = 1, vocab_multiple: int = 1, vocab_extra: int = 0
) -> Mapping:
    """Returns the map of a model.

    Args:
        config: the model.
        tp: tensor parallel size, which decides what runs replicated (heads that do not divide).
        vocab_multiple: Megatron's ``--make-vocab-size-divisible-by``.
        vocab_extra: ``--extra-vocab-size``.

    Raises:
        ConfigError: the decoder cannot be cut into ``tp`` parts; with the sizes that can.
    """
    check_tensor_parallel(config.text, tp)
    vocab = Layout(dim=0, vocab_multiple=vocab_multiple, vocab_extra=vocab_extra)
    entries = [*_vision(config, tp), *_connector(config, tp), *llama_entries(config.text, vocab, "model.text_model.")]
    tied = {"lm_head.weight": "model.text_model.embed_tokens.weight"} if config.text.tie_word_embeddings else {}
    rotary = (f"model.text_model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.text.num_layers))
    return Mapping(
        entries=tuple(entries),
        vocab_size=config.text.vocab_size,
        hf_tied=tied,
        ignored=frozenset(["model.vision_model.embeddings.position_ids", *rotary]),  # buffers in files of old versions
    )


def _vision(config: Idefics2ModelConfig, tp: int) -> list[Entry]:
    vision = config.vision
    column, row = (COLUMN, ROW) if config.vision_sharded(tp) else (REPLICATED, REPLICATED)
    hf, mg = "model.vision_model.", "vision_model."
    entries = [
        direct(mg + "patch_embedding.weight", hf + "embeddings.patch_embedding.weight"),
        direct(mg + "patch_embedding.bias", hf + "embeddings.patch_embedding.bias"),
        direct(mg + "position_embedding.weight", hf + "embeddings.position_embedding.weight"),
    ]
    heads = vision.num_attention_heads
    for i in range(vision.num_layers):
        h, m = f"{hf}encoder.layers.{i}.", f"{mg}encoder.layers.{i}."
        for norm, name in (("input_layernorm", "layer_norm1"), ("pre_mlp_layernorm", "layer_norm2")):
            entries += [direct(f"{m}{norm}.{kind}", f"{h}{name}.{kind}") for kind in ("weight", "bias")]
        for kind in ("weight", "bias"):
            names = [f"{h}self_attn.{x}_proj.{kind}" for x in "qkv"]
            entries.append(
                qkv(
                    f"{m}self_attention.linear_qkv.{kind}",
                    names,
                    num_heads=heads,
                    num_query_groups=heads,
                    layout=column,
                )
            )
            entries.append(direct(f"{m}mlp.linear_fc1.{kind}", f"{h}mlp.fc1.{kind}", column))
        for own, name in (("self_attention.linear_proj", "self_attn.out_proj"), ("mlp.linear_fc2", "mlp.fc2")):
            entries.append(direct(f"{m}{own}.weight", f"{h}{name}.weight", row))
            entries.append(direct(f"{m}{own}.bias", f"{h}{name}.bias"))
    entries += [
        direct(f"{mg}encoder.final_layernorm.{kind}", f"{hf}post_layernorm.{kind}") for kind in ("weight", "bias")
    ]
    return entries


def _connector(config: Idefics2ModelConfig, tp: int) -> list[Entry]:
    perceiver = config.perceiver
    column, row = (COLUMN, ROW) if config.perceiver_sharded(tp) else (REPLICATED, REPLICATED)
    hf = "model.connector."
    mg = "connector."
    entries = [
        gated(
            mg + "modality_projection.linear_fc1.weight",
            [hf + "modality_projection.gate_proj.weight", hf + "modality_projection.up_proj.weight"],
        ),
        direct(mg + "modality_projection.linear_fc2.weight", hf + "modality_projection.down_proj.weight", ROW),
        direct(mg + "perceiver_resampler.latents", hf + "perceiver_resampler.latents"),
    ]
    for i in range(perceiver.depth):
        h, m = f"{hf}perceiver_resampler.layers.{i}.", f"{mg}perceiver_resampler.layers.{i}."
        for norm in ("input_latents_norm", "input_context_norm", "post_attention_layernorm"):
            entries.append(direct(f"{m}{norm}.weight", f"{h}{norm}.weight"))
        for proj in ("q_proj", "k_proj", "v_proj"):
            entries.append(direct(f"{m}self_attn.{proj}.weight", f"{h}self_attn.{proj}.weight", column))
        entries.append(direct(f"{m}self_attn.o_proj.weight", f"{h}self_attn.o_proj.weight", row))
        entries.append(
            gated(f"{m}mlp.linear_fc1.weight", [f"{h}mlp.gate_proj.weight", f"{h}mlp.up_proj.weight"], GATED)
        )
        entries.append(direct(f"{m}mlp.linear_fc2.weight", f"{h}mlp.down_proj.weight", ROW))
    entries.append(direct(mg + "perceiver_resampler.norm.weight", hf + "perceiver_resampler.norm.weight"))
    return entries
