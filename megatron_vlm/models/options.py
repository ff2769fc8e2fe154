"""The section ``model`` of a run, and what parts of a model read of it and of others when they are built.

    ModelConfig, ParallelConfig, precision --RunConfig.model_options--> ModelOptions --> parts, with the family's config, topology

Imports no megatron-core.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.layers.rope import RopeScaling
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
        fp8: scaling of the decoder's products in fp8 (``layers/engines.py``); None: they are in the parameters' dtype.
        vision_head_multiple: attention of the tower runs with heads of a multiple of this size, filled up with zeros.
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
    transformer_impl: Literal["local", "fused", "transformer_engine", "apex"] = "local"
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = None
    vision_head_multiple: int = 1
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


ENGINES = {
    "transformer_engine": ("transformer-engine[pytorch]", "transformer_engine.pytorch"),
    "apex": (
        "apex (NVIDIA's, built from its repository with its CUDA extensions)",
        "apex.normalization.fused_layer_norm",
        "fused_layer_norm_cuda",
    ),
}
"""``transformer_impl`` that is a package of others -> how it is called, and its modules that layers/engines.py needs."""
_FP8_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Least compute capability of a GPU. Source: Transformer Engine 2.x, pytorch/fp8.py, check_*_support."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The model: what it is comes from ``checkpoint.load``; this says how it is treated.

    Attributes:
        family: name in the registry; None: as the checkpoint says. Another one than the checkpoint's is an error.
        freeze_llm: keep embedding, decoder and head fixed.
        freeze_vision: keep the vision tower fixed.
        freeze_connector: keep projection and perceiver fixed.
        make_vocab_size_divisible_by: pad the vocabulary to a multiple of this times tp.
        drop_path_rate: stochastic depth of the vision tower: the rate of its last layer, growing from 0 at the first.
        rope_scaling: stretches the positions beyond those of the checkpoint: transformers' ``rope_scaling``, which checkpoints
            and exports then say; without a factor as far as ``data.seq_length`` needs. None: as the checkpoint says.
        transformer_impl: ``local``; or ``fused``: bias, activation and gate of an MLP, and RoPE, as one kernel each, compiled
            at the first step (by torch.compile, which needs a C compiler); ``transformer_engine``: as fused, products and norms
            by Transformer Engine; ``apex``: as fused, norms by apex; ``auto``: fused on a GPU, else local.
        fp8: products of the decoder's linears in fp8 by Transformer Engine, scaled by tensor, by block of 128, or by 32 numbers
            (mxfp8); weights, gradients and all else stay as ``training.precision`` says. None: they are in bf16.
        attention: kernel of attention: ``auto``, the newest that is installed and knows the GPU, but for FlashAttention 4, whose
            heads are of some sizes only; FlashAttention 4 or 3 (through torch's switch) or 2; ``torch_varlen``, torch's own;
            ``segments``, exact, segment by segment (CPU, and fp32).
        vision_head_multiple: attention of the tower runs with heads of a multiple of this size, filled up with zeros, which
            changes no result: 96 or 128 for heads of 72 or 80, where a kernel is faster so.
    """

    family: str | None = None
    freeze_llm: bool = False
    freeze_vision: bool = False
    freeze_connector: bool = False
    make_vocab_size_divisible_by: int = 128
    drop_path_rate: float = 0.0
    rope_scaling: RopeScaling | None = None
    transformer_impl: Literal["auto", "local", "fused", "transformer_engine", "apex"] = "local"
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = None
    attention: Literal["auto", "flash_attn_4", "flash_attn_3", "flash_attn", "torch_varlen", "segments"] = "auto"
    vision_head_multiple: int = 1

    def __post_init__(self) -> None:
        if self.fp8 is not None and self.transformer_impl != "transformer_engine":
            raise ConfigError(f"model.fp8 {self.fp8} needs model.transformer_impl=transformer_engine")
        if self.vision_head_multiple < 1:
            raise ConfigError(f"model.vision_head_multiple must be at least 1, got {self.vision_head_multiple}")
        if self.make_vocab_size_divisible_by < 1:
            raise ConfigError(
                f"model.make_vocab_size_divisible_by must be at least 1, got {self.make_vocab_size_divisible_by}"
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ConfigError(f"model.drop_path_rate must be at least 0 and below 1, got {self.drop_path_rate}")

    @property
    def freeze(self) -> tuple[str, ...]:
        """Names of the frozen parameter groups."""
        return tuple(group for group in ("llm", "vision", "connector") if getattr(self, f"freeze_{group}"))

    def check_device(self) -> None:
        """What only a process of the run can tell: its packages and its GPU.

        Raises:
            ConfigError: ``transformer_impl`` or ``fp8`` cannot run here.
        """
        package, *modules = ENGINES.get(self.transformer_impl, ("",))
        try:
            for module in modules:
                importlib.import_module(module)
        except Exception as error:  # whatever a package of that name, or one made for other versions, raises
            raise ConfigError(
                f"model.transformer_impl {self.transformer_impl} needs the package {package}, which cannot be used here "
                f"({error}): install it, or set fused, which needs none"
            ) from error
        if self.fp8 is not None and (found := torch.cuda.get_device_capability()) < (
            least := _FP8_CAPABILITY[self.fp8]
        ):
            fit = " or ".join(name for name, other in _FP8_CAPABILITY.items() if other <= found)
            raise ConfigError(
                "model.fp8 {} needs a GPU of compute capability {}.{} or above, this one has {}.{}: {}".format(
                    self.fp8, *least, *found, f"set {fit}" if fit else "leave it out"
                )
            )

    def layers_on(self, device: str) -> Any:
        """``transformer_impl``, and what auto means on a device."""
        choice = "fused" if device == "cuda" else "local"
        return choice if self.transformer_impl == "auto" else self.transformer_impl
