"""What megatron-core's SelfAttention needs of us: the segments of a row, and core attention over them.

megatron-core 0.16.1's own DotProductAttention refuses packed sequences and materialises the scores.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_vlm.layers.attention import attention


@dataclass
class RowParams(PackedSeqParams):
    """megatron-core's packed sequence parameters of one row.

    ``cu_seqlens_q`` holds the segments that attention keeps apart. RoPE reads ``cu_seqlens_*_padded``: one segment [0, T] on
    the host, because the angles given to it are those of each token's own position already; so no kernel waits for the
    device and no loop over segments runs.

    Attributes:
        image_positions: int64, tokens of the row that hold image features; None: not said, no layer needs to know.
    """

    image_positions: Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor, max_seqlen: int, total: int) -> "RowParams":
        whole = torch.tensor([0, total], dtype=torch.int32, device="cpu")
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=whole,
            cu_seqlens_kv_padded=whole,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
        )

    @functools.cached_property
    def image_mask(self) -> Tensor | None:
        """bool [T, 1, 1], true where a token holds an image feature; None: not said."""
        if self.image_positions is None:
            return None
        total = int(self.cu_seqlens_q_padded[1])  # on the host
        mask = torch.zeros(total, 1, 1, dtype=torch.bool, device=self.image_positions.device)
        return mask.index_fill_(0, self.image_positions, True)


class CoreAttention(MegatronModule):
    """For megatron-core's SelfAttention: q [T, heads / tp, D], k and v [T, groups / tp, D] -> [T, heads / tp * D]."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *args: Any, **kwargs: Any
    ):
        super().__init__(config=config)
        self.causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.window = config.window_size[0] + 1 if config.window_size is not None and self.causal else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        row = packed_seq_params
        if row is None:
            raise ValueError("rows are packed: pass packed_seq_params")
        output = attention(
            query,
            key,
            value,
            row.cu_seqlens_q,
            row.cu_seqlens_kv,
            row.max_seqlen_q,
            row.max_seqlen_kv,
            self.causal,
            self.window,
        )
        return output.reshape(output.shape[0], -1)
