"""What megatron-core's SelfAttention needs of us: the segments of a row, and core attention over them.

megatron-core 0.16.1's own DotProductAttention refuses packed sequences and materialises the scores.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_vlm.layers.attention import attention, to_device
from megatron_vlm.layers.context.attention import Deal, context_attention
from megatron_vlm.layers.context.blocks import Blocks


@dataclass
class RowParams(PackedSeqParams):
    """megatron-core's packed sequence parameters of one row.

    ``cu_seqlens_q`` holds the segments that attention keeps apart. RoPE reads ``cu_seqlens_*_padded``: one segment [0, T] on
    the host, because the angles given to it are those of each token's own position already; so no kernel waits for the
    device and no loop over segments runs.

    Attributes:
        image_positions: int64, tokens of the row that hold image features; None: not said, no layer needs to know.
        blocks: tokens that see each other both ways, in a decoder whose images do; None: attention is causal.
        rotation: cos and sin of this rank's tokens, where an attention applies RoPE itself (``layers/fused.py``).
        local: the same row for layers whose RoPE has a base of its own, and ``angles``, what these are given.
        cache: keys and values of the tokens before these, while generating; ``cu_seqlens_kv`` then counts them too.
        deal: the row lies over context parallel ranks; ``cu_seqlens_q`` is the whole row's, all else this rank's.
    """

    image_positions: Tensor | None = None
    deal: Deal | None = None
    blocks: Blocks | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    local: "RowParams | None" = None
    angles: Tensor | None = None
    cache: "KVCache | None" = None

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
    def text_mask(self) -> Tensor | None:
        """bool [T, 1, 1], false where a token holds an image feature; None: not said."""
        if self.image_positions is None:
            return None
        total = int(self.cu_seqlens_q_padded[1])  # on the host
        mask = torch.ones(total, 1, 1, dtype=torch.bool, device=self.image_positions.device)
        return mask.index_fill_(0, self.image_positions, False)


class KVCache:
    """Keys and values of the segments of a row that grows token by token, for the decoder layers of one rank.

    Attributes:
        lengths: tokens of each segment so far, those of the pass in work included.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._before: list[int] = []
        self._counts: list[int] = []
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def row(self, counts: Sequence[int], num_filler: int, device: torch.device) -> RowParams:
        """Parameters of the next forward pass, which every layer of it runs through ``extend`` once.

        Args:
            counts: new tokens of each segment.
            num_filler: tokens of a filler segment after them, which is not kept.
            device: of the row.
        """
        self._before = self.lengths or [0] * len(counts)
        self._counts = list(counts)
        self.lengths = [old + new for old, new in zip(self._before, counts, strict=True)]
        filler = [num_filler] if num_filler else []
        new, keys = [*counts, *filler], [*self.lengths, *filler]
        row = RowParams.of(_starts(new, device), max(new), sum(new))
        row.cu_seqlens_kv, row.max_seqlen_kv, row.cache = _starts(keys, device), max(keys), self
        return row

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new keys and values of a layer [T, G, D] and returns all of them, segment by segment, filler last."""
        real = sum(self._counts)
        whole = []
        for new, old in zip((key, value), self._layers.get(layer, (key[:0], value[:0]))):
            pieces = zip(old.split(self._before), new[:real].split(self._counts))
            whole.append(torch.cat([piece for pair in pieces for piece in pair]))
        self._layers[layer] = (whole[0], whole[1])
        if real == len(key):
            return whole[0], whole[1]
        return torch.cat([whole[0], key[real:]]), torch.cat([whole[1], value[real:]])

    def keep(self, segments: Sequence[int]) -> None:
        """Forgets all segments but these."""
        for layer, pair in self._layers.items():
            key, value = (torch.cat([x.split(self.lengths)[i] for i in segments]) for x in pair)
            self._layers[layer] = (key, value)
        self.lengths = [self.lengths[i] for i in segments]


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


class CoreAttention(MegatronModule):
    """For megatron-core's SelfAttention: q [T, heads / tp, D], k and v [T, groups / tp, D] -> [T, heads / tp * D]."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *args: Any, **kwargs: Any
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        # Else the recomputation of the layer, or of its core attention, does it.
        recomputed = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        self.recompute = config.recompute_granularity != "full" and not recomputed
        # Of RoPE scaled by YaRN, which sharpens attention; scaled queries serve every kernel.
        scale = getattr(config, "softmax_scale", None)
        self.query_scale = None if scale is None else scale * config.kv_channels**0.5
        self.head_multiple = getattr(config, "head_multiple", 1)  # of a tower (models/parts/build.py)
        windowed = self.causal and is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size[0] + 1 if windowed and config.window_size is not None else None

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
        if self.query_scale is not None:
            query = query * self.query_scale
        cache = getattr(row, "cache", None)
        if cache is not None:
            key, value = cache.extend(self.layer_number, key, value)
        deal = getattr(row, "deal", None)
        if deal is not None:
            output = context_attention(
                query, key, value, deal, self.window, recompute=self.recompute, blocks=row.blocks
            )
            return output.reshape(output.shape[0], -1)
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
            self.head_multiple,
        )
        call = row.blocks.whole(self.window) if getattr(row, "blocks", None) is not None else None
        if call is not None:
            output = call.replace(output, query, key, value, self.window)
        return output.reshape(output.shape[0], -1)
