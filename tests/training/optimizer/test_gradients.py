"""Gradient buffers that no pass zeroes: what they hold of an earlier step is never read."""

import pytest
import torch

from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import wrapped_for_test
from megatron_vlm.testing.twins.small_families import write_small_twin
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.step import run_schedule


def norms(directory, rows, parallel):
    """On a rank: norms of the gradients of tower and decoder, after a step with images, one without, and the first again."""
    model, _ = wrapped_for_test(directory, parallel, {}, None, OptimizerConfig())
    found = []
    for row in (*rows, rows[0]):
        for stage in model:
            stage.zero_grad_buffer()
        run_schedule(model, [row, row], forward_only=False)
        parts = {part: [p.main_grad for n, p in model.named_parameters() if n.startswith(part)] for part in PARTS}
        found.append([float(torch.stack([g.norm() for g in grads]).norm()) for grads in parts.values()])
    return found


PARTS = ("vision_model", "language_model")


def test_a_step_reads_no_gradient_of_an_earlier_one(tmp_path):
    twin = write_small_twin("idefics2", tmp_path)
    rows = [twin.row([(1, 9)], seed=0), twin.row([(0, 9)], seed=1)]
    for parallel in ({}, {"overlap_grad_reduce": True}):
        ((images, text, again),) = run_distributed(norms, twin.directory, rows, parallel)
        assert min(images) > 0 and again == images
        assert text[0] == 0 and 0 < text[1] != images[1]


def frozen(directory, rows):
    """On a rank: the norm of a tower's gradients that no backward pass of the second step came to."""
    model, _ = wrapped_for_test(directory, {}, {}, None, OptimizerConfig())
    (ddp,) = model.stages
    run_schedule(model, rows[:1], forward_only=False)
    tower = [p for n, p in model.named_parameters() if n.startswith(PARTS[0])]
    before = float(torch.stack([p.main_grad.norm() for p in tower]).norm())
    ddp.zero_grad_buffer()
    assert all(p.gradient_unset for p in tower)
    ddp.finish_grad_sync()
    return before, float(torch.stack([p.main_grad.norm() for p in tower]).norm())


def test_what_no_gradient_came_to_is_zero(tmp_path):
    twin = write_small_twin("idefics2", tmp_path)
    ((before, after),) = run_distributed(frozen, twin.directory, [twin.row([(1, 9)], seed=0)])
    assert before > 0 and after == 0


def of_microbatches(directory, row):
    """On a rank: the gradients after one microbatch, and after the same one twice, by name."""
    model, _ = wrapped_for_test(directory, {}, {}, None, OptimizerConfig())
    found = []
    for count in (1, 2):
        for stage in model:
            stage.zero_grad_buffer()
        run_schedule(model, [row] * count, forward_only=False)
        found.append({name: p.main_grad.clone() for name, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("name", ["idefics2", "smolvlm"])
def test_each_microbatch_counts_once(tmp_path, name):
    """megatron-core adds the gradient of weights that a head shares with the embeddings, whatever is said of them."""
    twin = write_small_twin(name, tmp_path)
    (((one, two)),) = run_distributed(of_microbatches, twin.directory, twin.row([(1, 9)], seed=0))
    tied = not any("output_layer" in name for name in one)
    assert tied == (name == "smolvlm")
    for key, gradient in one.items():
        torch.testing.assert_close(two[key], gradient, rtol=1e-5, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
