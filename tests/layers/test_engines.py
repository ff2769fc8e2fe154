"""Layers on Transformer Engine and apex, tried on stand-ins of their documented interfaces: neither runs without a GPU.

A stand-in has the names, arguments, shapes and refusals of the real package; its numbers are plain torch's, in fp8 rounded to
E4M3 by one scale a tensor.
"""

import contextlib
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers import engines, fused, norm
from megatron_vlm.layers.linear import ColumnLinear
from megatron_vlm.models.options import ModelConfig
from megatron_vlm.options.flags import parse_flags
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.testing import shapes
from megatron_vlm.testing.distributed import run_alone, run_distributed
from megatron_vlm.testing.layouts import GRADIENT
from megatron_vlm.testing.parity import build_for_test, gradient_errors, layout_gradients
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.small_families import write_small_twin
from megatron_vlm.training.memory.estimate import _World
from megatron_vlm.training.memory.trace import Meter
from megatron_vlm.training.run_config import RunConfig


class Calls:
    """How often each part of a stand-in ran, and in which recipe."""

    counts: ClassVar[dict] = {}
    recipe = None

    @classmethod
    def note(cls, name):
        cls.counts[name] = cls.counts.get(name, 0) + 1


def rounded(x):
    """x in E4M3 by its largest number; gradients pass as they are."""
    scale = 448 / x.detach().abs().max().clamp(min=1e-12)
    return x + ((x.detach() * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale - x.detach())


class Linear(torch.nn.Module):
    """Of transformer_engine.pytorch."""

    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
        get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False, params_dtype=None, parallel_mode=None,
        parameters_split=None, device="cuda",
    ):  # fmt: skip
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        assert not bias and parallel_mode is None and parameters_split is None

    def forward(self, inp, is_first_microbatch=None, fp8_output=False):
        Calls.note("Linear fp8" if Calls.recipe else "Linear")
        assert inp.shape[-1] == self.weight.shape[1] and inp.dtype == self.weight.dtype
        if not Calls.recipe:
            return F.linear(inp, self.weight)
        assert inp.dim() == 2 and len(inp) % 32 == 0 and not any(size % 32 for size in self.weight.shape)
        return F.linear(rounded(inp), rounded(self.weight))


class RMSNorm(torch.nn.Module):
    """Of transformer_engine.pytorch."""

    def __init__(self, normalized_shape, eps=1e-5, sequence_parallel=None, zero_centered_gamma=False, *, device, dtype):
        super().__init__()
        self.eps, self.weight = eps, torch.nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))
        self.around_zero = zero_centered_gamma

    def forward(self, x):
        Calls.note("RMSNorm")
        return F.rms_norm(x, self.weight.shape, self.weight + self.around_zero, self.eps)


class LayerNorm(RMSNorm):
    """Of transformer_engine.pytorch."""

    def __init__(self, normalized_shape, **more):
        super().__init__(normalized_shape, **more)
        self.bias = torch.nn.Parameter(torch.empty_like(self.weight))

    def forward(self, x):
        Calls.note("LayerNorm")
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
    Calls.recipe = type(fp8_recipe).__name__ if enabled else None
    yield
    Calls.recipe = None


@contextlib.contextmanager
def stand_ins():
    """The packages of a process, for a while."""

    def package(name, **names):
        made = ModuleType(name)
        vars(made).update(names)
        return made

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        Calls.note("apex RMSNorm")
        return F.rms_norm(input, normalized_shape, weight, eps)

    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
        Calls.note("apex LayerNorm")
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    recipes = {name: type(name, (), {}) for name in ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")}
    parts = dict(Linear=Linear, RMSNorm=RMSNorm, LayerNorm=LayerNorm, fp8_autocast=fp8_autocast)
    functions = dict(fused_rms_norm_affine=fused_rms_norm_affine, fused_layer_norm_affine=fused_layer_norm_affine)
    made = {
        "transformer_engine": package("transformer_engine"),
        "transformer_engine.pytorch": package("transformer_engine.pytorch", **parts),
        "transformer_engine.common": package("transformer_engine.common"),
        "transformer_engine.common.recipe": package("transformer_engine.common.recipe", **recipes),
        "apex": package("apex"),
        "apex.normalization": package("apex.normalization"),
        "apex.normalization.fused_layer_norm": package("apex.normalization.fused_layer_norm", **functions),
    }
    sys.modules.update(made)
    kernels = dict(fused.KERNELS)
    fused.KERNELS.update({function: function for function in kernels})
    Calls.counts.clear()
    try:
        yield
    finally:
        fused.KERNELS.update(kernels)
        for name in made:
            del sys.modules[name]


def gradients(directory, rows, parallel, options):
    """On a rank: loss and gradients of a global batch, and what ran."""
    with stand_ins():
        return layout_gradients(directory, [rows], parallel, options)[0], dict(Calls.counts)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return write_small_twin("idefics2", tmp_path_factory.mktemp("engines"))


KINDS = ("RMSNorm", "LayerNorm")
TWO = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    "impl, parallel, ran",
    [
        ("transformer_engine", TWO, {"Linear", *KINDS}),
        pytest.param(
            "transformer_engine", {"tensor_model_parallel_size": 2}, {"Linear", *KINDS}, marks=pytest.mark.full
        ),
        # a whole tower beside a decoder in parts, of which megatron-core tells no class but its own MLP
        ("apex", {"tensor_model_parallel_size": 2, "vision_parallel": "share"}, {f"apex {kind}" for kind in KINDS}),
    ],
)
def test_layers_equal_plain_ones_under_the_same_names(twin, impl, parallel, ran):
    rows, sizes = [twin.row([(1, 9), (0, 6)], seed=0), twin.row([(0, 13)], seed=1)], {"tp": 2 if parallel else 1}
    plain, found = (
        run_distributed(gradients, twin.directory, rows, parallel, options, **sizes)
        for options in ({}, {"transformer_impl": impl})
    )
    for (theirs, nothing), (ours, counts) in zip(plain, found):
        assert not nothing and set(counts) == ran
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert max(gradient_errors(ours["grads"], theirs["grads"]).values()) < GRADIENT


@pytest.mark.parametrize("kind", [engines.EngineRMSNorm, engines.ApexRMSNorm])
@pytest.mark.parametrize("around_zero", [False, True])
def test_norms_know_of_a_weight_around_zero(kind, around_zero):
    config = SimpleNamespace(
        layernorm_zero_centered_gamma=around_zero,
        params_dtype=torch.float32,
        sequence_parallel=False,
        use_cpu_initialization=True,
    )
    made = kind(config, 6)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(-0.5, 0.5, 6))
    x = torch.randn(5, 6)
    with stand_ins():
        ours = made(x)
    torch.testing.assert_close(ours, norm.RMSNorm.forward(made, x))


def fp8_names(directory, options):
    """On a rank: names of parameters and modules, and how the products of a decoder layer ran for 37 tokens."""
    with stand_ins():
        _, _, (stage,), _ = build_for_test(directory, {}, options)
        column = stage.language_model.decoder.layers[0].mlp.linear_fc1
        x = torch.randn(37, 1, column.weight.shape[1], dtype=column.weight.dtype)
        plain, ours = F.linear(x, column.weight), column(x)[0]
        off = float((ours - plain).norm() / plain.norm())
        names = [*dict(stage.named_parameters()), *dict(stage.named_modules())]
        return [name for name in names if "engine" in name], off, dict(Calls.counts)


def test_fp8_is_of_the_decoders_products(tmp_path):
    write_tiny_idefics2(tmp_path)
    options = {"transformer_impl": "transformer_engine", "params_dtype": "bf16"}
    ((names, off, counts),) = run_distributed(fp8_names, str(tmp_path), {**options, "fp8": "mxfp8"})
    assert not names  # what is lent a weight is nobody's module: no checkpoint or conversion sees it
    assert counts == {"Linear fp8": 1} and 5e-3 < off < 8e-2, (counts, off)
    ((_, off, counts),) = run_distributed(fp8_names, str(tmp_path), options)
    assert counts == {"Linear": 1} and off == 0


SECTIONS = {"data": {"seq_length": 64, "train": ["x"]}, "training": {"train_iters": 1}, "checkpoint": {"load": "x"}}


def test_what_is_not_installed_is_refused_by_name():
    for impl, package in (("transformer_engine", r"transformer-engine\[pytorch\]"), ("apex", "apex")):
        with pytest.raises(
            ConfigError, match=f"model.transformer_impl {impl} needs the package {package}.*cannot be used here"
        ):
            ModelConfig(transformer_impl=impl).check_device()  # a run is planned where it is not installed
    with pytest.raises(ConfigError, match=r"model.fp8 mxfp8 needs model.transformer_impl=transformer_engine"):
        RunConfig.from_dict({"model": {"fp8": "mxfp8", "transformer_impl": "fused"}, **SECTIONS})
    assert parse_flags(["--fp8-recipe", "tensorwise"]).settings == [("model.fp8", "tensorwise")]
    with pytest.raises(ConfigError, match="give --fp8-recipe"):
        parse_flags(["--fp8-format", "hybrid"])


def test_another_package_of_that_name_and_an_older_gpu_are_refused(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"NVIDIA's.*No module named 'apex.normalization'"):
        ModelConfig(transformer_impl="apex").check_device()
    sys.modules.pop("apex")
    with stand_ins():
        for fp8, least, below, instead in (
            ("tensorwise", (8, 9), (8, 0), "leave it out"),
            ("blockwise", (9, 0), (8, 9), "set tensorwise"),
            ("mxfp8", (10, 0), (9, 0), "set tensorwise or blockwise"),
        ):
            model = ModelConfig(transformer_impl="transformer_engine", fp8=fp8)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda least=least: least)
            model.check_device()
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda below=below: below)
            with pytest.raises(ConfigError, match=f"model.fp8 {fp8} needs a GPU of compute capability .*: {instead}$"):
                model.check_device()


def kept_under_sequence_parallelism():
    """Bytes that one more pass of a column parallel linear keeps for its backward pass, plain and by Transformer Engine; its
    input is not new."""
    found = []
    with _World(ParallelConfig(**TWO), shapes.small()["idefics2"], 2, 0) as topology:
        options = dict(bias=False, skip_bias_add=False, gather_output=False, init_method=lambda weight: None)
        settings = TransformerConfig(
            num_layers=1, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=2, sequence_parallel=True
        )
        for kind in (ColumnLinear, engines.EngineColumnLinear):
            with torch.device("meta"):
                linear = kind(64, 96, config=settings, tp_group=topology.tp_group, **options)
            x = torch.empty(1000, 1, 64, device="meta", requires_grad=True)
            with Meter() as meter:
                first, _ = linear(x)
                before = meter.now
                output, _ = linear(x)
                found.append(meter.now - before - output.nbytes)
            del first
    return found


@pytest.mark.full
def test_what_is_kept_is_counted_as_transformer_engine_keeps_it():
    """The whole input; megatron-core's product keeps a rank's tokens and gathers them once more."""
    assert run_alone(kept_under_sequence_parallelism) == [0, 2000 * 64 * 4]


def test_they_run_on_a_gpu_alone():
    model = {"transformer_impl": "transformer_engine", "fp8": "tensorwise"}
    run = RunConfig.from_dict({"model": model, **SECTIONS})
    with pytest.raises(ConfigError, match="runs on a GPU alone, and this run is on the CPU: set local"):
        run.check_world(1)
    run = RunConfig.from_dict(
        {"model": model, **SECTIONS, "training": {"train_iters": 1, "device": "cuda", "dry_run": True}}
    )
    with pytest.raises(ConfigError, match=r"model.fp8 tensorwise needs training.precision=bf16, got fp32"):
        run.check_world(1)
