"""Builds the MLP projector between a tower and a decoder (``layers/projector.py``) for any family."""

from typing import TypeVar

import torch.nn.functional as F

from megatron_vlm.layers.projector import Projector
from megatron_vlm.models.language import transformer_config
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.topology import Topology

P = TypeVar("P", bound=Projector)


def build_projector(
    kind: type[P],
    width: int,
    hidden_size: int,
    topology: Topology,
    options: ModelOptions,
    norm_epsilon: float | None = None,
) -> P:
    """The projector, split by the width between its linears.

    Args:
        kind: class to make.
        width: of the features.
        hidden_size: of the decoder.
        topology, options: of the model.
        norm_epsilon: of the norm before it; None: there is none.
    """
    mcore = transformer_config(
        topology,
        options,
        decoder=False,
        tp=1,
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=1,
        activation_func=F.gelu,
        add_bias_linear=True,
    )
    return kind(mcore, width, topology.tp_group, norm_epsilon)
