"""Options of a model, and the groups of its parameters."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.options import GROUPS, ModelOptions, group_of


def test_parameters_belong_to_one_group():
    assert {group_of(prefix + "x.weight") for prefix in GROUPS.values()} == set(GROUPS)
    with pytest.raises(ValueError, match=r"'head\.weight' belongs to no group"):
        group_of("head.weight")


def test_values():
    options = ModelOptions(params_dtype="bf16", make_vocab_size_divisible_by=8)
    assert options.torch_dtype is torch.bfloat16
    assert options.vocab_split.dim == 0 and options.vocab_split.vocab_multiple == 8
    with pytest.raises(ConfigError, match=r"cannot freeze 'visions'.*vision"):
        ModelOptions(freeze=("visions",))
