"""Options of a model."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.options import ModelOptions


def test_values():
    options = ModelOptions(params_dtype="bf16", make_vocab_size_divisible_by=8)
    assert options.torch_dtype is torch.bfloat16
    assert options.vocab_split.dim == 0 and options.vocab_split.vocab_multiple == 8
    with pytest.raises(ConfigError, match=r"cannot freeze 'visions'.*vision"):
        ModelOptions(freeze=("visions",))
