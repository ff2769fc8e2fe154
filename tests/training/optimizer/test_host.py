"""The optimizer on the host: the same numbers bit for bit, and none of its bytes on the device."""

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.parallel.shards import held
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import random_samples, wrapped_for_test
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.training.optimizer import host
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.optimizer.host import on_host
from megatron_vlm.weights.mapping import GROUPS

UPDATES = 10


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(directory, rows)"""
    directory = str(tmp_path_factory.mktemp("twin"))
    hf = write_tiny_idefics2(directory, std=0.15)
    config = registry.get("idefics2").config(hf.config.to_dict())
    made = [([(16, 24)], 9), ([], 7), ([(16, 16)], 6), ([], 8)]
    return directory, [row_from_samples(random_samples(config, [s], seed=i), multiple_of=2) for i, s in enumerate(made)]


def trained(directory, rows, parallel, ways, options, learning):
    """On a rank: of each way, losses, norms, all weights and the optimizer's state after some updates."""
    from megatron_vlm.training.optimizer.build import set_learning_rates
    from megatron_vlm.training.optimizer.state import fragments
    from megatron_vlm.training.step import train_step

    host.PIECE, found = 1000, []  # several pieces to a parameter
    for way in ways:
        config = OptimizerConfig(**learning)
        model, optimizer = wrapped_for_test(directory, {**parallel, **way}, options, None, config)
        mine, history = rows[model.topology.dp_rank :: model.topology.dp], []
        for number in range(UPDATES):
            set_learning_rates(optimizer, dict.fromkeys(GROUPS, 1e-3 * (1 + number)), 0.1)
            result = train_step(model, optimizer, mine)
            history.append((result.loss, result.grad_norm, result.skipped))
        state = [
            (f.start, f.end, f.sharded, f.step, {kind: t.clone() for kind, t in f.state().items()})
            for f in sorted(fragments(optimizer), key=lambda f: names_of(model)[id(f.parameter)])
        ]
        parts = getattr(optimizer, "parts", [])
        share = sum(len(part.main) for part in parts if part.host) / max(1, sum(len(part.main) for part in parts))
        found.append((history, {name: held(p)[0].clone() for name, p in model.named_parameters()}, state, share))
    return found


def names_of(model):
    return {id(parameter): name for name, parameter in model.named_parameters()}


WAYS = {
    "bf16": (dict(), dict(params_dtype="bf16"), dict(clip_grad=0.5)),
    "fp32": (dict(), dict(), dict(clip_grad=1.0)),
    "bf16 gradients": (dict(accumulate_allreduce_grads_in_fp32=False), dict(params_dtype="bf16"), dict(clip_grad=0.5)),
    "fp32 distributed": (dict(data_parallel_sharding="optimizer"), dict(), dict(clip_grad=0.0)),
    "bf16 distributed": (dict(data_parallel_sharding="optimizer"), dict(params_dtype="bf16"), dict(clip_grad=0.5)),
    "bf16 in shards": (dict(data_parallel_sharding="parameters"), dict(params_dtype="bf16"), dict(clip_grad=0.5)),
    "tp": (dict(tensor_model_parallel_size=2, sequence_parallel=True), dict(params_dtype="bf16"), dict(clip_grad=0.5)),
}


SHARDED = dict(data_parallel_sharding="parameters")
ALL = {
    "fp32 weights": (SHARDED, dict(), dict(clip_grad=1.0)),
    "bf16 weights": (SHARDED, dict(params_dtype="bf16"), dict(clip_grad=0.5)),
    "tp weights": (
        SHARDED | dict(tensor_model_parallel_size=2, sequence_parallel=True), dict(params_dtype="bf16"), dict(clip_grad=0.5),
    ),
}  # fmt: skip
WAYS |= ALL
BY_DEFAULT = ("fp32", "bf16 distributed", "bf16 weights")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.full) for name in WAYS]
)
def test_the_same_numbers_bit_for_bit(twin, name):
    parallel, options, learning = WAYS[name]
    tp = parallel.get("tensor_model_parallel_size", 1)
    ways = [dict(), dict(offload="optimizer"), dict(offload="optimizer", offload_fraction=0.5)]
    if name in ALL:
        ways[1:] = [dict(offload="optimizer+parameters")]
    sizes = dict(tp=tp, dp=1 + any(word in name for word in ("distributed", "shards", "weights")))
    ranks = run_distributed(trained, *twin, parallel, ways, options, learning, **sizes)
    for (history, weights, state, _), *others in ranks:
        assert history[0][0] > history[-1][0] and all(norm > 0.5 for _, norm, _ in history)
        for found in others:
            assert found[0] == history
            assert all(torch.equal(found[1][key], weight) for key, weight in weights.items())
            assert len(found[2]) == len(state) > 20
            for mine, plain in zip(found[2], state):
                assert mine[:4] == plain[:4]
                assert mine[4].keys() == plain[4].keys() and all(torch.equal(mine[4][k], plain[4][k]) for k in mine[4])
        assert others[0][3] == 1 and (name in ALL or 0.3 < others[1][3] <= 0.5)


def test_a_share_goes_to_the_host():
    assert on_host([5, 4, 3, 2, 1], 1.0) == [True] * 5
    assert on_host([5, 4, 3, 2, 1], 0.0) == [False] * 5
    assert on_host([5, 4, 3, 2, 1], 0.5) == [True, False, False, True, False]
