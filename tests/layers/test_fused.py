"""Fused element-wise kernels equal the plain layers, forward and backward; compiled ones too, which takes seconds: ``full``."""

import contextlib
import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import reset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers import attention, core_attention, fused, norm
from megatron_vlm.layers.core_attention import RowParams
from megatron_vlm.models.built import build_model
from megatron_vlm.models.language import gelu_tanh
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.options.flags import parse_flags
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.topology import build_topology
from megatron_vlm.testing import shapes
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.layouts import GRADIENT, Case, idefics2_check
from megatron_vlm.testing.parity import gradient_errors, layout_gradients, random_samples, wrapped_for_test
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.small_families import NAMES, write_small_twin
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.run_config import RunConfig
from megatron_vlm.training.step import start_step

SPECS = [[(1, 9), (0, 4)], [(0, 11)], [(2, 7)]]  # samples of a row: images, text tokens
MLPS = [(F.silu, True, False), (F.silu, True, True), (F.gelu, False, True), (gelu_tanh, False, True)]


@contextlib.contextmanager
def kernels(compiled):
    """On a rank or here: the functions as they are, or compiled."""
    before = dict(fused.KERNELS)
    fused.KERNELS.update({} if compiled else {function: function for function in before})
    reset()
    yield
    fused.KERNELS.update(before)


def kernel_errors(dtype: torch.dtype) -> dict[str, list[tuple[float, float]]]:
    """By kernel, of its output and each gradient: relative distance from float64, of the fused and the plain form."""
    torch.manual_seed(0)
    found = {}

    def compare(name, ours, plain, inputs):
        results = []
        for function, cast in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
            leaves = [x.detach().to(cast).requires_grad_() for x in inputs]
            output = function(*leaves)
            grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(cast)
            results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
        distances = [
            [float((x.double() - y).norm() / y.norm()) for x, y in zip(result, results[2])] for result in results[:2]
        ]
        found[name] = list(zip(*distances))

    for activation, gated, bias in MLPS:
        how = dict(activation=activation, gated=gated)
        for tokens in (37, 1):
            x = [torch.randn(tokens, 1, 94).to(dtype), *([torch.randn(94).to(dtype)] if bias else [])]
            ours = partial(lambda x, b=None, **how: fused.Activate.apply(x, b, *how.values()), **how)
            plain = partial(lambda x, b=None, **how: fused.activate(x, b, **how), **how)
            compare(f"{activation.__name__} {gated} {bias} {tokens}", ours, plain, x)
    angles = torch.rand(37, 1, 7) * 50

    def plain_rope(x):
        cos, sin = (torch.cat([a, a], -1).to(x.dtype) for a in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    turn = angles.cos(), angles.sin()
    compare("rope", lambda x: fused.Rotate.apply(x, *turn), plain_rope, [torch.randn(37, 3, 14)])

    def plain_split(x):
        return torch.cat([plain_rope(x[:, :, :3].reshape(37, 6, 14)), plain_rope(x[:, :, 3]), x[:, :, 4]], 1)

    compare(
        "split", lambda x: torch.cat(fused.SplitRotated.apply(x, *turn), 1), plain_split, [torch.randn(37, 2, 5, 14)]
    )
    return found


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_kernels_equal_plain_layers(compiled):
    with kernels(compiled):
        exact, half = kernel_errors(torch.float32), kernel_errors(torch.bfloat16)
    for name, errors in exact.items():
        assert max(error for error, _ in errors) < 1e-6, name
    for name, errors in half.items():
        # bf16 within the plain form's own distance from exact numbers; a tenth for what rounding does to so few of them.
        assert all(error <= 1.1 * plain for error, plain in errors), (name, errors)


def gradients(directory, rows, parallel, impl, dtype, compiled):
    """On a rank: loss and gradients of a global batch."""
    with kernels(compiled):
        return layout_gradients(directory, [rows], parallel, {"transformer_impl": impl, "params_dtype": dtype})[0]


def check_family(name, directory, rows, compiled, **parallel):
    """Loss and each gradient of fused layers against plain ones, fp32; in bf16 as far from fp32 as plain ones are."""
    recompute = parallel.pop("recompute_granularity", None)
    runs = {}
    for impl, dtype in (("local", "fp32"), ("fused", "fp32"), ("local", "bf16"), ("fused", "bf16")):
        layout = {"recompute_granularity": recompute, **parallel}
        (runs[impl, dtype],) = run_distributed(gradients, directory, rows, layout, impl, dtype, compiled)
    exact, ours = runs["local", "fp32"], runs["fused", "fp32"]
    assert ours["loss"] == pytest.approx(exact["loss"], rel=1e-6), name
    assert max(gradient_errors(ours["grads"], exact["grads"]).values()) < GRADIENT, name
    off = {impl: gradient_errors(runs[impl, "bf16"]["grads"], exact["grads"]).values() for impl in ("local", "fused")}
    assert sum(off["fused"]) <= 1.1 * sum(off["local"]), name


QWEN3 = dict(text=dict(model_type="qwen3", head_dim=12))


@pytest.mark.parametrize("name, options", [("idefics2", {}), ("xcomposer2", {}), ("internvl3", QWEN3)])
def test_a_model_of_fused_layers_equals_plain_ones(name, options, tmp_path):
    twin = write_small_twin(name, tmp_path, **options)
    rows = [twin.row(specs, seed=i) for i, specs in enumerate(SPECS)]
    check_family(name, twin.directory, rows, False, recompute_granularity="full" if name == "xcomposer2" else None)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_every_family_compiled_equals_plain_layers(name, tmp_path):
    twin = write_small_twin(name, tmp_path)
    specs = [[(0, tokens) for _, tokens in row] for row in SPECS] if name == "internlm2" else SPECS
    check_family(name, twin.directory, [twin.row(samples, seed=i) for i, samples in enumerate(specs)], True)


def test_only_the_input_is_kept():
    """Plain layers keep the activation, the gate's and the product's factors; fused ones what the linear gave them."""
    x, kept = torch.randn(5, 1, 24, requires_grad=True), {}
    with (
        kernels(False),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t),
    ):
        fused.Activate.apply(x, None, F.silu, True)
        fused.Rotate.apply(x[:, 0].unflatten(-1, (2, -1)), torch.ones(5, 1, 6), torch.ones(5, 1, 6))
    assert sorted(t.numel() for t in kept.values()) == [30, 30, 120]


class Count(TorchDispatchMode):
    """Bytes that kernels read and write, and their number, without products and attention. Of ours: arguments and results."""

    def __init__(self):
        super().__init__()
        self.bytes, self.kernels, self.on = 0, 0, True

    def add(self, *tensors):
        self.kernels += 1
        self.bytes += sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (
            self.on
            and not func.is_view
            and name not in ("mm", "addmm", "detach", "_unsafe_view", "empty", "empty_like")
        ):
            self.add(args, kwargs, output)
        return output

    def one(self, function):
        """``function`` counted as one kernel."""

        def call(*args):
            self.on = False
            output = function(*args)
            self.on = True
            self.add(args, output)
            return output

        return call


class Stand(torch.autograd.Function):
    """In place of what is not counted, or is one kernel on CUDA: only shapes, on meta."""

    @staticmethod
    def forward(ctx, one, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.one = one
        return one(torch.empty_like)(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        first = ctx.one(lambda grad, x: torch.empty_like(x))(grad, saved[0])
        return None, first, *(torch.empty_like(x) for x in saved[1:])


def layer_traffic(impl):
    """On a rank: (bytes a token, kernels) of a decoder layer, forward and backward in bf16, as wide as a 1.2B model's."""
    topology = build_topology(ParallelConfig(), num_layers=1, device=torch.device("cpu"))
    config = shapes.small()["idefics2"]
    wide = dict(hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16, num_query_groups=8, head_dim=128)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=1, **wide))
    options = ModelOptions(params_dtype="bf16", transformer_impl=impl, make_vocab_size_divisible_by=1)
    small, large = (count_layer(config, topology, options, tokens) for tokens in (128, 256))
    return (large.bytes - small.bytes) / 128, small.kernels


def count_layer(config, topology, options, tokens):
    """Counts the first decoder layer on meta."""
    count, fuses = Count(), options.transformer_impl == "fused"
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(core_attention, "attention", lambda q, k, v, *_: Stand.apply(lambda f: f, q, k, v))
        patch.setattr(norm.F, "rms_norm", lambda x, shape, weight, eps: Stand.apply(count.one, x, weight))
        for function in fused.KERNELS:
            patch.setitem(fused.KERNELS, function, count.one(function))
        (stage,) = build_model(registry.get("idefics2"), config, topology, options)
        decoder, row = stage.language_model.train().decoder, RowParams.of(torch.zeros(2), tokens, tokens)
        x = torch.empty(tokens, 1, 2048, dtype=torch.bfloat16, requires_grad=True)
        row.rotation = (torch.empty(tokens, 1, 64),) * 2 if fuses else None
        angles = None if fuses else torch.empty(tokens, 1, 1, 128)
        with count:
            y, _ = decoder.layers[0](x, None, rotary_pos_emb=angles, packed_seq_params=row)
            y.backward(torch.empty_like(y))
    return count


def test_bytes_and_kernels_of_a_layer():
    ((plain, plain_kernels),) = run_distributed(layer_traffic, "local")
    ((ours, kernels),) = run_distributed(layer_traffic, "fused")
    assert plain == 515072  # as counted from outside, before there were fused layers
    assert ours <= 220_000 and kernels <= 12, (ours, kernels, plain_kernels)


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, vision="share", updates=1),  # a whole tower beside a decoder in parts
        Case(tp=2, sp=True, pp=2, recompute=True, updates=3),
        Case(tp=4, updates=3),  # more ranks than key/value heads
        Case(cp=2, dp=2, do=True, overlap=True, updates=3),
    ],
    ids=str,
)
def test_layouts_of_fused_layers(case, tmp_path):
    rows = [[([(24, 48)], 14), ([], 9)]] * 4
    check = idefics2_check(tmp_path, rows, text="llama", kv_heads=2, perceiver_kv_heads=1)
    check.options = {"transformer_impl": "fused"}
    check.check(case)


def test_a_run_says_what_layers_are_made_of():
    settings = parse_flags(["--transformer-impl", "fused"]).settings
    assert settings == [("model.transformer_impl", "fused")]
    sections = {"data": {"seq_length": 64, "train": ["x"]}, "training": {"train_iters": 1}, "checkpoint": {"load": "x"}}
    run = RunConfig.from_dict({"model": {"transformer_impl": "fused"}, **sections})
    assert run.model_options.transformer_impl == "fused"
    run = RunConfig.from_dict({"model": {"transformer_impl": "auto"}, **sections})
    assert (run.model.layers_on("cuda"), run.model.layers_on("cpu")) == ("fused", "local")
    with pytest.raises(ConfigError, match="transformer_impl must be one of auto, local, fused"):
        RunConfig.from_dict({"model": {"transformer_impl": "fast"}})


def kernels_of_a_row(hf_dir, rows):
    """On a rank: kernels that a second row adds to a step in bf16, kernels of ours, norms and attention as one each."""
    options = {"params_dtype": "bf16", "transformer_impl": "fused"}
    model, optimizer = wrapped_for_test(hf_dir, {}, options, None, OptimizerConfig(fused=True))
    start_step(model, optimizer, rows[:1])
    numbers = []
    for some in (rows[:1], rows):
        count = Launches()
        with pytest.MonkeyPatch.context() as patch:
            for function in fused.KERNELS:
                patch.setitem(fused.KERNELS, function, count.one(function))
            patch.setattr(fused, "add_product", count.one(fused.add_product))
            patch.setattr(attention, "_segments", lambda *args, count=count: OneKernel.apply(count, segments, *args))
            patch.setattr(norm.F, "rms_norm", lambda *args, count=count: OneKernel.apply(count, F_rms_norm, *args))
            with count:
                start_step(model, optimizer, some)
        numbers.append(count.kernels)
    return numbers[1] - numbers[0]


segments, F_rms_norm = attention._segments, F.rms_norm


class Launches(Count):
    """Kernels, products too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        empty = func.overloadpacket.__name__ in (
            "detach",
            "_unsafe_view",
            "empty",
            "empty_like",
            "new_empty",
            "empty_strided",
        )
        self.kernels += self.on and not func.is_view and not empty and func.namespace != "c10d"
        return output

    def add(self, *tensors):
        self.kernels += 1


class OneKernel(torch.autograd.Function):
    """A function that is one kernel on CUDA each way."""

    @staticmethod
    def forward(ctx, count, function, *args):
        ctx.count, ctx.function, ctx.args = count, function, args
        return count.one(function)(*args)

    @staticmethod
    def backward(ctx, grad):
        def again():
            with torch.enable_grad():
                args = [a.detach().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else a for a in ctx.args]
                inputs = [a for a in args if torch.is_tensor(a) and a.requires_grad]
                found = iter(torch.autograd.grad(ctx.function(*args), inputs, grad))
                return [next(found) if torch.is_tensor(a) and a.requires_grad else None for a in args]

        return None, None, *ctx.count.one(again)()


def test_kernels_of_a_row(tmp_path):
    """As many layers as the 1.17B model that was measured has; it launched 2,221 more for a second row."""
    directory = str(tmp_path)
    hf = write_tiny_idefics2(directory, layers=16, vision_layers=12, depth=3)
    config = registry.get("idefics2").config(hf.config.to_dict())
    rows = [row_from_samples(random_samples(config, [([(28, 28)], 40)] * 4, seed=i)) for i in range(2)]
    ((number),) = run_distributed(kernels_of_a_row, directory, rows)
    print(number, "kernels a row")
    assert number <= 1400
