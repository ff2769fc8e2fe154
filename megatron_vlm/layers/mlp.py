"""A (gated) MLP over tensor parallel ranks, for connectors: megatron-core's MLP without a layer around it."""

import copy
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from megatron_vlm.layers.backend import backend_of


class ParallelMLP(MLP):
    """input_size -> ffn_hidden_size -> config.hidden_size; activation and gating come from ``config``.

    Input [..., input_size] is whole on every rank of ``tp_group``, and so is the output.
    """

    def __init__(self, config: TransformerConfig, input_size: int, ffn_hidden_size: int, tp_group: Any):
        config = copy.copy(config)  # linear_fc2 takes its width from the config alone
        config.ffn_hidden_size = ffn_hidden_size
        backend = backend_of(config)
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=backend.column, linear_fc2=backend.row),
            input_size=input_size,
            ffn_hidden_size=ffn_hidden_size,
            tp_group=tp_group,
        )

    def forward(self, x: Tensor, **unused: Any) -> Tensor:
        output, bias = backend_of(self.config).mlp.forward(self, x)
        return output if bias is None else output + bias
