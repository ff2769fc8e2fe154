"""Weights, gradients and optimizer state in shards: what each rank holds. Resumes: training/checkpoint/test_load.py."""

from typing import Any

import pytest

from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import random_samples, wrapped_for_test
from megatron_vlm.training.optimizer.config import OptimizerConfig

ROWS = [[([(16, 24)], 9)], [([], 12)], [([(24, 16), (16, 16)], 7)], [([], 5)]]


def counts(hf_dir: str, parallel: dict, options: dict) -> dict[str, Any]:
    """On a rank: elements of weights, gradients and moments after a step, and the marks of the parameters."""
    from megatron_vlm.parallel.shards import held
    from megatron_vlm.training.optimizer.build import set_learning_rates
    from megatron_vlm.training.optimizer.state import fragments
    from megatron_vlm.training.step import train_step
    from megatron_vlm.weights.mapping import GROUPS

    model, optimizer = wrapped_for_test(hf_dir, parallel, options, None, OptimizerConfig(lr=1e-3))
    topology = model.topology
    rows = [
        row_from_samples(random_samples(model.config, specs, seed=i), multiple_of=2) for i, specs in enumerate(ROWS)
    ]
    set_learning_rates(optimizer, dict.fromkeys(GROUPS, 1e-3), 0.01)
    train_step(model, optimizer, rows[topology.dp_rank :: topology.dp])
    parameters = dict(model.named_parameters())
    parts = fragments(optimizer)
    whole = sum(p.numel() for p in parameters.values())
    return {
        "weights": sum(held(p)[0].numel() for p in parameters.values()) / whole,
        "gradients": sum(part.main.grad.numel() for part in parts) / whole,
        "moments": sum(part.state()["exp_avg"].numel() for part in parts) / whole,
        "marks": {n: (p.tensor_model_parallel, getattr(p, "sequence_parallel", False)) for n, p in parameters.items()},
    }


def test_each_rank_holds_its_part(twin):
    def run(sharding, **sizes):
        parallel = dict(data_parallel_sharding=sharding, tensor_model_parallel_size=sizes.get("tp", 1))
        parallel["sequence_parallel"] = sizes.get("tp", 1) > 1
        return run_distributed(counts, str(twin), parallel, {}, **sizes)

    plain = run("none", tp=2)[0]["marks"]
    for found in run("parameters", tp=2, dp=2):
        assert found["marks"] == plain and any(mark for _, mark in plain.values())
        for what in ("weights", "gradients", "moments"):
            assert found[what] == pytest.approx(0.5, abs=0.01), what
    assert sum(found["weights"] for found in run("gradients", dp=4)) == pytest.approx(1)


def frozen(hf_dir: str, ways: list[dict]) -> list[tuple[float, float, bool]]:
    """On a rank: of each way, what a step of a model returns in which nothing trains."""
    from megatron_vlm.training.step import train_step

    found = []
    for parallel in ways:
        options = dict(freeze=("llm", "vision", "connector"))
        model, optimizer = wrapped_for_test(hf_dir, parallel, options, None, OptimizerConfig())
        row = row_from_samples(random_samples(model.config, ROWS[0], seed=0), multiple_of=2)
        result = train_step(model, optimizer, [row])
        found.append((result.loss, result.grad_norm, result.skipped))
    return found


def test_nothing_trains(twin):
    ways = [
        dict(data_parallel_sharding=kind, offload=host)
        for kind in ("none", "parameters")
        for host in ("none", "optimizer")
    ]
    plain, *others = run_distributed(frozen, str(twin), ways, dp=2)[0]
    assert plain[0] > 1 and plain[1:] == (0.0, False)
    assert others == [(pytest.approx(plain[0]), 0.0, False)] * 3
