"""A step that asks the device for nothing: what would make the host wait for a GPU is counted on the CPU.

Host tensors are the rows and what is made of them alone; all others stand for the device's.
"""

import dataclasses
import inspect
import traceback

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron_vlm.layers import attention, fused
from megatron_vlm.layers.attention import to_device
from megatron_vlm.parallel import batch
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import build_for_test, wrapped_for_test
from megatron_vlm.testing.twins.small_families import NAMES, write_small_twin
from megatron_vlm.training import step
from megatron_vlm.training.optimizer.config import OptimizerConfig

ASK = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
FACTORIES = {"arange", "full", "zeros", "ones", "empty"}  # of the CPU, where no device is named
LOCKS = {"to_device", "move", "send"}  # page-lock what they copy: layers/attention.py, data/row.py, parallel/host.py
TO_HOST = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}


class Waits(TorchDispatchMode):
    """``found``: name and place of each."""

    def __init__(self, host):
        super().__init__()
        self.found, self.kept = [], []
        self.host = set()
        self.add(host)

    def add(self, tensors):
        self.kept += [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]  # so that no memory is used again
        self.host |= {t.untyped_storage().data_ptr() for t in self.kept}

    def on_host(self, tensors):
        found = [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]
        return bool(found) and all(t.untyped_storage().data_ptr() in self.host for t in found)

    def note(self, name):
        places = [f"{f.filename.split('site-packages/')[-1]}:{f.lineno}" for f in traceback.extract_stack()]
        self.found.append((name, [p for p in places if "torch/" not in p and "test_waits" not in p][-3:]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        host = self.on_host((args, kwargs))
        masks = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if masks and name != "index" and args[2].dim() == 0:  # x[mask] = number: masked_fill on a GPU
            masks = False
        if not host and (name in ASK or masks or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
            self.note(name)
        output = func(*args, **kwargs)
        if host:
            self.add(output)
        return output


class Calls(TorchFunctionMode):
    """What never reaches a kernel on the CPU: reads of memory, and blocking copies."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, waits = kwargs or {}, getattr(func, "__name__", ""), self.waits
        if name in ("tensor", "as_tensor"):  # not by identity: parallel/cpu.py wraps them
            made, device = func(*args, **kwargs), kwargs.get("device")
            if device is None or device == "cpu":
                waits.add(made)
            else:
                waits.note("a tensor made of numbers, by a blocking copy")
            return made
        if name in TO_HOST and not waits.on_host(args[:1]):
            waits.note(name)
        if name in FACTORIES and not any(isinstance(x, torch.Tensor) for x in args) and "device" not in kwargs:
            made = func(*args, **kwargs)
            waits.add(made)
            return made
        if name == "to" and any(isinstance(x, torch.device) for x in (*args[1:], *kwargs.values())):
            # What is not page-locked first is copied with a wait whatever is asked for.
            if waits.on_host(args[:1]) and not (kwargs.get("non_blocking") and inspect.stack()[1].function in LOCKS):
                waits.note("a blocking copy to the device")
            with _disable_current_modes():
                return func(*args, **kwargs).clone()
        return func(*args, **kwargs)


def waits_of_a_step(directory, rows, parallel):
    """On a rank: what a step of this layout waits for."""
    options = {"params_dtype": "bf16", "transformer_impl": "fused"}
    model, optimizer = wrapped_for_test(directory, parallel, options, None, OptimizerConfig(fused=True))
    mine = rows[model.topology.dp_rank :: model.topology.dp]
    segments = attention._segments

    def kernel(*args):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return segments(*args)

    with pytest.MonkeyPatch.context() as patch:
        for function in fused.KERNELS:
            patch.setitem(fused.KERNELS, function, function)
        patch.setattr(attention, "_segments", kernel)
        step.start_step(model, optimizer, mine)  # what is made once, such as the state of AdamW
        waits = Waits(
            [
                [*row.tokens.values(), row.cu_seqlens, row.loss_positions, row.image_positions, *row.pixels]
                for row in mine
            ]
        )
        with waits, Calls(waits):
            step.start_step(model, optimizer, mine)
    return waits.found


@pytest.mark.parametrize(
    "name", ["idefics2", *(pytest.param(n, marks=pytest.mark.full) for n in NAMES if n != "idefics2")]
)
def test_a_step_waits_for_nothing(name, tmp_path):
    twin = write_small_twin(name, tmp_path)
    specs = [[(1, 9), (0, 6)], [(0, 13)]] if name != "internlm2" else [[(0, 9), (0, 6)], [(0, 13)]]
    rows = [twin.row(samples, seed=i) for i, samples in enumerate(specs)]
    (found,) = run_distributed(waits_of_a_step, twin.directory, rows, {})
    assert not found, found
    if name == "idefics2":
        two, cp = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}
        for parallel, sizes in (
            ({"data_parallel_sharding": "optimizer"}, {"dp": 2}),
            (two, {"tp": 2}),
            (cp, {"cp": 2}),
            ({**cp, "vision_parallel": "ahead"}, {"cp": 2}),
        ):
            for rank in run_distributed(waits_of_a_step, twin.directory, rows, parallel, **sizes):
                assert not rank, (parallel, rank)


def test_what_waits_is_counted():
    cpu, row = torch.device("cpu"), torch.arange(3)
    waits = Waits([row])
    with waits, Calls(waits):
        there = to_device(row, cpu) * 1.0
        assert not waits.found and int(row.sum()) == 3 and not waits.found
        _ = (
            torch.tensor(3, device=cpu),
            row.to(cpu),
            row.to(cpu, non_blocking=True),
            there[there > 1],
            there.nonzero(),
            bool(there.sum() > 0),
            there.tolist(),
        )
        _ = there.repeat_interleave(row.to(cpu, non_blocking=True))
    kinds = {name for name, _ in waits.found}
    assert {"index", "nonzero", "__bool__", "tolist", "repeat_interleave", "a blocking copy to the device"} <= kinds
    assert any("made of numbers" in kind for kind in kinds)
    assert sum("blocking copy" in kind for kind, _ in waits.found) == 4  # from memory that is not page-locked, too
    waits.found.clear()
    with waits, Calls(waits):
        to_device(row, cpu), to_device(torch.arange(3), cpu)
    assert not waits.found


def told(directory, rows):
    """On a rank beside a GPU that is not there: the rows shared, a flag of one of them."""
    topology, *_ = build_for_test(directory, {"tensor_model_parallel_size": 2}, {})
    elsewhere = dataclasses.replace(topology, device=torch.device("cuda"))
    shared, extra = batch.share_rows(elsewhere, rows if topology.is_source else None, 7, None)
    flag = batch.any_rank(topology.tp_rank == 1, elsewhere.device)
    return [row.input_ids for row in shared], extra, flag


def test_what_ranks_tell_each_other_touches_no_device(tmp_path):
    twin = write_small_twin("idefics2", tmp_path)
    rows = [twin.row([(0, 9)], seed=0)]
    for ids, extra, flag in run_distributed(told, twin.directory, rows, tp=2):
        assert torch.equal(ids[0], rows[0].input_ids) and extra == 7 and flag
