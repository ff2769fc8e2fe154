"""How a model is built, beside its family's config and the topology: read by every part of it. Imports no megatron-core."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.parallel.config import Recomputed
from megatron_vlm.weights.mapping import GROUPS, Split
from megatron_vlm.weights.safetensors_io import PARAMS_DTYPES

_MCORE = {"core_attention": "core_attn", "mlp": "mlp"}
"""Parts of a layer, as megatron-core names them. Norms are models/saved_tensors.py's: megatron-core 0.16.1's recomputation of a
norm takes ``fp8=False`` for fp8 and asks for Transformer Engine."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Config):
    """How a model is built, beside its own config and the topology.

    Attributes:
        params_dtype: dtype of the parameters and activations.
        sequence_parallel: the decoder's activations are split along the sequence between tensor parallel regions.
        recompute_granularity, recompute_num_layers, recompute_modules, offload_activations: of ``ParallelConfig``.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times tp.
        freeze: parameter groups that do not train: llm, vision, connector.
        drop_path_rate: probability that the tower's last layer leaves out an image's update in training (stochastic depth).
        transformer_impl: what layers are made of (``layers/backend.py``).
        build_on_cpu: parameters are made in the CPU's memory, which takes none before they are filled; the caller moves what
            it keeps to the device.
    """

    params_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    sequence_parallel: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[Recomputed, ...] = ()
    offload_activations: bool = False
    make_vocab_size_divisible_by: int = 128
    freeze: tuple[str, ...] = ()
    drop_path_rate: float = 0.0
    transformer_impl: Literal["local", "fused"] = "local"
    build_on_cpu: bool = False

    def __post_init__(self) -> None:
        for group in self.freeze:
            if group not in GROUPS:
                raise ConfigError(f"cannot freeze {group!r}{nearest(group, GROUPS)}")

    def recomputes(self, module: Recomputed) -> bool:
        """It is computed again in the backward pass."""
        if self.recompute_granularity == "selective":
            return module in (self.recompute_modules or ("core_attention",))
        return self.recompute_granularity == "full"

    def recomputation(self, *, decoder: bool) -> dict[str, Any]:
        """megatron-core's settings for the layers of the decoder, or of tower and connector."""
        if self.recompute_granularity == "full" or (not decoder and self.recomputes("tower")):
            count = self.recompute_num_layers if decoder else None  # a tower's layers cost little time
            method = "block" if count else "uniform"
            return dict(recompute_granularity="full", recompute_method=method, recompute_num_layers=count or 1)
        modules = [name for module, name in _MCORE.items() if self.recomputes(module)]  # type: ignore[arg-type]
        return dict(recompute_granularity="selective", recompute_modules=modules) if decoder and modules else {}

    @property
    def torch_dtype(self) -> torch.dtype:
        return PARAMS_DTYPES[self.params_dtype]

    @property
    def vocab_split(self) -> Split:
        """How embedding and head lie over tensor parallel ranks."""
        return Split(dim=0, vocab_multiple=self.make_vocab_size_divisible_by)
