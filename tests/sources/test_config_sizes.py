"""Sizes of a config that the tensors contradict are named with both numbers."""

from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.errors import ConversionError
from megatron_vlm.sources.config_sizes import check_layers, check_sizes, described
from megatron_vlm.weights.mapping import TensorInfo

TEXT = SimpleNamespace(
    vocab_size=96, hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=8, ffn_hidden_size=48
)
LAYER = "language_model.decoder.layers.0."
SHAPES = {
    "language_model.embedding.word_embeddings.weight": (96, 32),
    f"{LAYER}self_attention.linear_qkv.weight": (64, 32),
    f"{LAYER}self_attention.linear_proj.weight": (32, 32),
    f"{LAYER}mlp.linear_fc1.weight": (96, 32),
    f"{LAYER}mlp.linear_fc2.weight": (32, 48),
}


def infos(**changes):
    shapes = {name: changes.get(name.rpartition(".")[0].rpartition(".")[2], shape) for name, shape in SHAPES.items()}
    return {name: TensorInfo(dtype=torch.float32, shape=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(word_embeddings=(97, 32)), r"vocab_size 96, which makes 96 of dimension 0 of .*; the files hold 97"),
        (dict(word_embeddings=(96, 64)), r"hidden_size 32, .* the files hold 64"),
        (
            dict(linear_qkv=(48, 32)),
            r"num_attention_heads 4, num_key_value_heads 2 and head_dim 8, which makes 64 .* hold 48",
        ),
        (dict(linear_fc1=(80, 32)), r"intermediate_size 48, which makes 96 .* hold 80"),
    ],
)
def test_a_size_that_the_tensors_contradict(changes, message):
    config = SimpleNamespace(text=TEXT)
    check_sizes(config, infos(), "DIR")
    with pytest.raises(ConversionError, match=f"DIR: config.json says {message}"):
        check_sizes(config, infos(**changes), "DIR")
    assert "vocab_size 96; hidden_size 32; " in described(config)


def test_layers_that_are_missing_or_too_many():
    names = [f"model.layers.{i}.mlp.weight" for i in range(3)]
    check_layers(names, names, "DIR")
    check_layers([], names, "DIR")  # told as missing tensors
    with pytest.raises(ConversionError, match=r"num_hidden_layers 3 for model.layers, the files hold 2 layers there"):
        check_layers(names[:2], names, "DIR")
    with pytest.raises(ConversionError, match=r"resampler_depth 1 for connector.perceiver.layers, the files hold 2"):
        check_layers([f"connector.perceiver.layers.{i}.w" for i in (0, 1)], ["connector.perceiver.layers.0.w"], "DIR")
