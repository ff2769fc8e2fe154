"""The folded update: the numbers of megatron-core's, its bytes counted, and fewer of them."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers import fused
from megatron_vlm.options.flags import parse_flags
from megatron_vlm.parallel.shards import held
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import random_samples, wrapped_for_test
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.training import step
from megatron_vlm.training.optimizer import update
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.run_config import RunConfig
from megatron_vlm.weights.mapping import GROUPS

SPECS = [([(16, 24)], 9), ([], 7), ([(16, 16)], 6), ([], 8)]
CLIP = 6.5  # above the norm of some updates, below that of others


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(directory, rows)"""
    directory = str(tmp_path_factory.mktemp("twin"))
    hf = write_tiny_idefics2(directory, std=0.15)
    config = registry.get("idefics2").config(hf.config.to_dict())
    return directory, [
        row_from_samples(random_samples(config, [s], seed=i), multiple_of=2) for i, s in enumerate(SPECS)
    ]


def trained(directory, rows, parallel, options):
    """On a rank: by ``optimizer.fused``, losses and norms of some updates, and all weights after them."""
    from megatron_vlm.training.optimizer.build import set_learning_rates

    found = {}
    for folds in (False, True):
        config = OptimizerConfig(fused=folds, clip_grad=CLIP, initial_loss_scale=64.0)
        model, optimizer = wrapped_for_test(directory, parallel, options, None, config)
        mine, history = rows[model.topology.dp_rank :: model.topology.dp], []
        for _ in range(8):
            set_learning_rates(optimizer, dict.fromkeys(GROUPS, 1e-3), 0.1)
            result = step.train_step(model, optimizer, mine)
            history.append((result.loss, result.grad_norm))
        found[folds] = history, {name: held(p)[0].clone() for name, p in model.named_parameters()}
    return found


WAYS = {
    "fp32": ({}, {}),
    "bf16 distributed": (
        {"data_parallel_sharding": "optimizer", "overlap_grad_reduce": True},
        {"params_dtype": "bf16"},
    ),
    "fp16": ({}, {"params_dtype": "fp16"}),
    "fp32 in shards": ({"data_parallel_sharding": "parameters"}, {}),
    "pp": ({"pipeline_model_parallel_size": 2}, {}),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("fp32", "bf16 distributed") else pytest.mark.full) for name in WAYS],
)
def test_the_folded_update_equals_the_plain_one(twin, name):
    parallel, options = WAYS[name]
    sizes = {"dp": 1 + ("data_parallel_sharding" in parallel), "pp": parallel.get("pipeline_model_parallel_size", 1)}
    for rank in run_distributed(trained, *twin, parallel, options, **sizes):
        (history, weights), (folded, ours) = rank[False], rank[True]
        norms = [norm for _, norm in history]
        assert max(norms) > CLIP > min(norms)  # clipped in some updates, not in others
        # One rounding of a gradient more or less, which AdamW makes an lr's worth of where a gradient is next to nothing.
        rounding = 2e-2 if "params_dtype" in options else 2e-5
        for plain, found in zip(history, folded, strict=True):
            assert found == pytest.approx(plain, rel=rounding)
        for key, weight in weights.items():
            if not key.endswith(
                "qkv.bias"
            ):  # the softmax does not see a key's bias: its gradients are rounding, and no more
                far = float((ours[key].double() - weight.double()).norm() / (weight.double().norm() + 1e-3))
                assert far < rounding, key


class Traffic(TorchDispatchMode):
    """Bytes that kernels read and write: of the optimizer, while ``on``; and of gradients of linears, a row."""

    def __init__(self, linears):
        super().__init__()
        self.on, self.optimizer, self.rows = False, 0, 0
        self.shapes = {p.shape for p in linears}
        self.places = {p.main_grad.data_ptr() for p in linears}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name, schema = func.overloadpacket.__name__, func._schema.arguments
        if func.is_view or name in ("empty", "empty_like", "detach", "new_empty") or func.namespace == "c10d":
            return output  # one rank sums nothing
        given = [*zip(schema, args), *((a, (kwargs or {}).get(a.name)) for a in schema[len(args) :])]
        moved = {}
        for argument, value in given:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            times = 2 if writes and name not in ("copy_", "zero_", "fill_") and argument.name != "out" else 1
            moved |= {id(t): times * t.nbytes for t in tree_leaves(value) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and id(t) not in moved]
        total = sum(moved.values()) + sum(t.nbytes for t in made)
        if self.on:
            self.optimizer += total
        elif any(t.data_ptr() in self.places for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)):
            self.rows += total
        else:
            self.rows += sum(t.nbytes for t in made if t.shape in self.shapes and name == "mm")  # a gradient by itself
        return output

    def counted(self, function):
        def call(*args, **kwargs):
            self.on, before = True, self.on
            output = function(*args, **kwargs)
            self.on = before
            return output

        return call

    def product(self, main, grad, x, begin):
        """In place of ``add_product``: one kernel on CUDA."""
        with torch.utils._python_dispatch._disable_current_modes():
            add_product(main, grad, x, begin)
        self.rows += main.nbytes * (1 if begin else 2)


add_product = fused.add_product


def traffic(directory, rows, impl, folds):
    """On a rank: (bytes a parameter of the optimizer's part of a step in bf16, a parameter and row of linears' gradients)."""
    options = {"params_dtype": "bf16", "transformer_impl": impl}
    model, optimizer = wrapped_for_test(directory, {}, options, None, OptimizerConfig(fused=folds, clip_grad=0.01))
    (ddp,) = model.stages
    weights = {
        id(m.weight): m.weight for n, m in ddp.named_modules() if "Linear" in type(m).__name__ and "output" not in n
    }
    with pytest.MonkeyPatch.context() as patch:
        for function in fused.KERNELS:
            patch.setitem(fused.KERNELS, function, function)
        step.train_step(model, optimizer, rows)
        count = Traffic([w for w in weights.values() if w.dim() == 2 and w.requires_grad])
        patch.setattr(fused, "add_product", count.product)
        patch.setattr(ddp, "zero_grad_buffer", count.counted(ddp.zero_grad_buffer))
        patch.setattr(optimizer, "step", count.counted(optimizer.step))
        config = ddp.module.config
        patch.setattr(config, "finalize_model_grads_func", count.counted(config.finalize_model_grads_func))
        with count:
            step.train_step(model, optimizer, rows)
    linears = sum(w.numel() for w in weights.values() if w.dim() == 2 and w.requires_grad)
    return count.optimizer / sum(p.numel() for p in ddp.parameters()), count.rows / linears / len(rows)


def test_bytes_of_a_step(twin):
    ((plain, added),) = run_distributed(traffic, *twin, "local", False)
    ((ours, in_place),) = run_distributed(traffic, *twin, "fused", True)
    print(f"{plain:.1f} and {ours:.1f} bytes a parameter, {added:.1f} and {in_place:.1f} a row")
    assert plain > 55
    assert ours <= 45
    assert in_place <= 8 < added


def test_another_adamw_is_not_folded():
    class Other(torch.optim.SGD):
        pass

    class Part:
        is_stub_optimizer, optimizer = False, Other([torch.nn.Parameter(torch.zeros(2))], lr=1.0)

    whole = SimpleNamespace(chained_optimizers=[Part()])
    assert update.fold_update(whole, None, 1, torch.device("cuda")) is None and not hasattr(whole, "step")
    with pytest.raises(ConfigError, match=r"megatron-core took .*Other, which is installed"):
        update.fold_update(whole, True, 1, torch.device("cpu"))


def test_the_setting():
    assert parse_flags(["--fused-adamw"]).settings == [("optimizer.fused", True)]
    sections = {"data": {"seq_length": 64, "train": ["x"]}, "training": {"train_iters": 1}, "checkpoint": {"load": "x"}}
    assert RunConfig.from_dict({"optimizer": {"fused": True}, **sections}).optimizer.fused
    with pytest.raises(ConfigError, match="no effect on an update of the host"):
        RunConfig.from_dict({"optimizer": {"fused": True}, "parallel": {"offload": "optimizer"}, **sections})
