"""Sizes in config.json against the tensors in the files: a contradiction is told by its key, before anything is built.

    full tensors by global name --shapes--> vocab_size, hidden_size, num_hidden_layers ... <--equal?--> model config

Global names are the same in every family, so that this knows none of them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_vlm.errors import ConversionError
from megatron_vlm.weights.mapping import TensorInfo

_LAYER = re.compile(r"(.*?(?:layers|blocks|layer))\.(\d+)\.")


def check_layers(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Compares how many layers of each stack the files hold with how many config.json says.

    Args:
        found: HF names in the files.
        wanted: HF names that the config asks for.
        where: what is read, for the error.

    Raises:
        ConversionError: a stack of layers has another length.
    """
    held, said = _stacks(found), _stacks(wanted)
    for stack in sorted(held.keys() & said.keys()):
        if held[stack] != said[stack]:
            key = "resampler_depth" if "perceiver" in stack else "num_hidden_layers"
            raise ConversionError(
                f"{where}: config.json says {key} {said[stack]:,} for {stack}, the files hold {held[stack]:,} layers there: "
                "correct config.json, or fetch the missing files"
            )


def check_sizes(config: Any, infos: Mapping[str, TensorInfo], where: str) -> None:
    """Compares the sizes of a model config with the shapes of its full tensors.

    Args:
        config: of the family.
        infos: full tensors by global name.
        where: what is read, for the error.

    Raises:
        ConversionError: a size is another one; key and both numbers are named.
    """
    for key, said, name, dim in _sizes(config, infos):
        info = infos.get(name)
        if info is not None and dim < len(info.shape) and info.shape[dim] != said:
            raise ConversionError(
                f"{where}: config.json says {key}, which makes {said:,} of dimension {dim} of {name}; the files hold "
                f"{info.shape[dim]:,} ({list(info.shape)}): correct config.json, or fetch the files again"
            )


def _stacks(names: Iterable[str]) -> Counter[str]:
    stacks: Counter[str] = Counter()
    for name in names:
        if match := _LAYER.match(name):
            stacks[match[1]] = max(stacks[match[1]], int(match[2]) + 1)
    return stacks


def described(config: Any) -> str:
    """What config.json says of sizes, in words."""
    return "config.json says " + "; ".join(dict.fromkeys(key for key, *_ in _sizes(config, {})))


def _sizes(config: Any, infos: Mapping[str, TensorInfo]) -> Iterable[tuple[str, int, str, int]]:
    """(key and value, size that it makes, global name, dimension)."""
    text, lm = config.text, "language_model."
    layer = f"{lm}decoder.layers.0."
    yield f"vocab_size {text.vocab_size:,}", text.vocab_size, f"{lm}embedding.word_embeddings.weight", 0
    yield f"hidden_size {text.hidden_size:,}", text.hidden_size, f"{lm}embedding.word_embeddings.weight", 1
    heads = f"num_attention_heads {text.num_attention_heads}, num_key_value_heads {text.num_query_groups}"
    heads += f" and head_dim {text.head_dim}"
    qkv = (text.num_attention_heads + 2 * text.num_query_groups) * text.head_dim
    yield heads, qkv, f"{layer}self_attention.linear_qkv.weight", 0
    yield heads, text.num_attention_heads * text.head_dim, f"{layer}self_attention.linear_proj.weight", 1
    ffn = f"intermediate_size {text.ffn_hidden_size:,}"
    yield ffn, 2 * text.ffn_hidden_size, f"{layer}mlp.linear_fc1.weight", 0
    yield ffn, text.ffn_hidden_size, f"{layer}mlp.linear_fc2.weight", 1
    vision = getattr(config, "vision", None)
    if vision is None:
        return
    tower, patches = "vision_model.", vision.side**2
    layer, width = f"{tower}encoder.layers.0.", f"vision_config.hidden_size {vision.hidden_size:,}"
    yield width, vision.hidden_size, f"{tower}patch_embedding.weight", 0
    yield width, vision.hidden_size, f"{layer}self_attention.linear_proj.weight", 0
    ffn = f"vision_config.intermediate_size {vision.ffn_hidden_size:,}"
    yield ffn, (1 + vision.gated_mlp) * vision.ffn_hidden_size, f"{layer}mlp.linear_fc1.weight", 0
    yield f"vision_config.num_channels {vision.num_channels}", vision.num_channels, f"{tower}patch_embedding.weight", 1
    yield f"vision_config.patch_size {vision.patch_size}", vision.patch_size, f"{tower}patch_embedding.weight", 3
    positions = f"vision_config.image_size {vision.image_size} and patch_size {vision.patch_size}"
    yield positions, patches + ("vision_model.class_embedding" in infos), f"{tower}position_embedding.weight", 0
    yield positions, patches + 1, f"{tower}position_embedding", 1
    rank = getattr(config, "plora_rank", None)
    if rank is not None:
        yield f"plora_rank {rank}", rank, "language_model.decoder.layers.0.self_attention.linear_qkv.plora.a", 0
    perceiver = getattr(config, "perceiver", None)
    if perceiver is not None:
        latents = f"perceiver_config.resampler_n_latents {perceiver.num_latents:,}"
        resampler = "connector.perceiver_resampler."
        yield latents, perceiver.num_latents, f"{resampler}latents", 0
        heads, groups, width = perceiver.num_attention_heads, perceiver.num_query_groups, perceiver.head_dim
        words = (
            f"perceiver_config.resampler_n_heads {heads}, num_key_value_heads {groups} and resampler_head_dim {width}"
        )
        yield words, heads * width, f"{resampler}layers.0.self_attn.q_proj.weight", 0
        yield words, groups * width, f"{resampler}layers.0.self_attn.k_proj.weight", 0
