"""Perceiver resampler: a fixed number of latents per image reads its patches through varlen cross-attention.

    context [P, H] (all images end to end) --depth x (cross-attention + MLP)--> latents [I * L, H] --norm--> features

Per layer: l = norm(latents), c = norm(context) - always of the ORIGINAL context; q from l; k, v from [c_i ; l_i] of image i.

Legend: P patches of I images, L latents per image, H hidden size, Q query heads, G key/value heads, D head dimension.
Source of the semantics: transformers 5.23, models/idefics2/modeling_idefics2.py; architecture: arXiv 2204.14198, 2405.02246.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.layers.attention import attention, to_device
from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.mlp import ParallelMLP


class Segments:
    """Where latents and keys of each image lie, shared by all layers of a forward pass.

    Attributes:
        cu_q, cu_k: int32 [I + 1], starts of each image's latents and of its [context ; latents] keys.
        max_q, max_k: longest of each.
        key_order: int64 [P + I * L], from [all context ; all latents] to [context_0 ; latents_0 ; context_1 ...];
            None for one image, which is in order already.
    """

    def __init__(self, counts: Sequence[int], num_latents: int, device: torch.device):
        images, total = len(counts), sum(counts)
        self.cu_q = torch.arange(0, (images + 1) * num_latents, num_latents, dtype=torch.int32, device=device)
        ends = torch.tensor([0, *(count + num_latents for count in counts)], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        )
        self.cu_k = to_device(ends, device)
        self.max_q, self.max_k = num_latents, max(counts) + num_latents
        self.key_order: Tensor | None = None
        if images > 1:
            context = torch.arange(total).split(list(counts))
            latents = torch.arange(total, total + images * num_latents).split(num_latents)
            self.key_order = to_device(torch.cat([x for pair in zip(context, latents) for x in pair]), device)


class PerceiverAttention(nn.Module):
    """Grouped cross-attention over tensor parallel ranks.

    Query heads are split over ranks. Key and value heads are too while there are enough of them; with more ranks than key/value
    heads each rank computes its slice of the projections, the slices are gathered, and each rank takes the head its queries
    use. The gather sums gradients on the way back, so that a head shared by several ranks gets all of its gradient.
    """

    def __init__(self, config: TransformerConfig, tp_group: Any):
        super().__init__()
        self.tp, self.rank = tp_group.size(), tp_group.rank()
        self.tp_group = tp_group
        self.head_dim, self.num_query_groups = config.kv_channels, config.num_query_groups
        shared = dict(config=config, init_method=config.init_method, bias=False, tp_group=tp_group)
        column = dict(shared, gather_output=False)
        hidden, width = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_width = self.num_query_groups * self.head_dim
        backend = backend_of(config)
        self.q_proj = backend.column(hidden, width, **column)
        self.k_proj = backend.column(hidden, kv_width, **column)
        self.v_proj = backend.column(hidden, kv_width, **column)
        self.o_proj = backend.row(width, hidden, input_is_parallel=True, skip_bias_add=False, **shared)

    def forward(self, latents: Tensor, context: Tensor, segments: Segments) -> Tensor:
        """latents [I * L, H], context [P, H], both normed -> [I * L, H]."""
        keys = torch.cat([context, latents])
        if segments.key_order is not None:
            keys = keys[segments.key_order]
        q = self.q_proj(latents)[0].unflatten(-1, (-1, self.head_dim))
        k, v = (self._heads(projection(keys)[0]) for projection in (self.k_proj, self.v_proj))
        output = attention(q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k)
        return self.o_proj(output.flatten(1))[0]

    def _heads(self, x: Tensor) -> Tensor:
        """[K, this rank's columns] -> [K, heads this rank's queries use, D]."""
        if self.tp > self.num_query_groups:
            x = all_gather_last_dim_from_tensor_parallel_region(x, group=self.tp_group)
            head = self.rank * self.num_query_groups // self.tp
            x = x[:, head * self.head_dim : (head + 1) * self.head_dim]
        return x.unflatten(-1, (-1, self.head_dim))


class PerceiverLayer(nn.Module):
    """Cross-attention and gated MLP, each with a residual on the un-normed latents."""

    def __init__(self, config: TransformerConfig, attention_module: PerceiverAttention, tp_group: Any):
        super().__init__()
        size, eps = config.hidden_size, config.layernorm_epsilon
        norm = backend_of(config).norm(config)
        self.input_latents_norm = norm(config, size, eps)
        self.input_context_norm = norm(config, size, eps)
        self.self_attn = attention_module
        self.post_attention_layernorm = norm(config, size, eps)
        self.mlp = ParallelMLP(config, size, config.ffn_hidden_size, tp_group)

    def forward(self, latents: Tensor, context: Tensor, segments: Segments) -> Tensor:
        latents = latents + self.self_attn(self.input_latents_norm(latents), self.input_context_norm(context), segments)
        return latents + self.mlp(self.post_attention_layernorm(latents))


class PerceiverResampler(nn.Module):
    """``depth`` layers over learned latents.

    Args:
        layers: the layers, in order.
        num_latents: L.
        config: gives hidden size, dtype and epsilon.
    """

    def __init__(self, config: TransformerConfig, layers: Sequence[PerceiverLayer], num_latents: int):
        super().__init__()
        self.latents = nn.Parameter(
            torch.ones(
                num_latents,
                config.hidden_size,
                dtype=config.params_dtype,
                device=layers[0].mlp.linear_fc2.weight.device,
            )
        )
        self.layers = nn.ModuleList(layers)
        self.norm = backend_of(config).norm(config)(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, context: Tensor, counts: Sequence[int]) -> Tensor:
        """context [P, H] with ``counts`` patches per image -> [I * L, H]."""
        segments = Segments(counts, len(self.latents), context.device)
        latents = self.latents.repeat(len(counts), 1)
        for layer in self.layers:
            latents = layer(latents, context, segments)
        return self.norm(latents)
