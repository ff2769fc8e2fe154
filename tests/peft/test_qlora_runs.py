"""Whole runs on a base in 4 bits: resume in any layout, the same from stored codes, and what does not train."""

from pathlib import Path

import pytest
import torch

from megatron_vlm.conversion.convert import hf2mg
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import metrics_of, train, write_shards
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.weights.rank_files import RankFiles

PEFT = "peft.target_modules=[q_proj,v_proj,down_proj,fc2] peft.modules_to_save=[modality_projection] peft.r=2"
NF4 = "peft.quantize=nf4 peft.quantize_groups=[llm,vision]"
LOSS = 1e-5  # relative, of each update in another layout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an HF twin ``hf``, shards of samples, and the run ``one`` of 4 updates that saved after 2."""
    folder = tmp_path_factory.mktemp("qlora")
    write_tiny_idefics2(folder / "hf")
    write_shards(folder / "data", 24, seed=1)
    run(folder, "one", "hf", f"{NF4} --save-interval 2")
    return folder


def arguments(place: Path, out: str, load: str, more: str, peft: str = PEFT) -> list[str]:
    return (
        f"--load {place / load} --data-path {place / 'data' / 'shards'} --seq-length 96 --micro-batch-size 2 "
        f"--global-batch-size 4 --lr 1e-3 --lr-decay-iters 10 --shortest-edge 24 --num-workers 0 --device cpu "
        f"--no-tensorboard --output-dir {place / out} --save {place / out} --make-vocab-size-divisible-by 8 "
        f"--train-iters 4 {peft} {more}"
    ).split()


def run(place: Path, out: str, load: str, more: str, **layout: int) -> None:
    results = run_distributed(train, arguments(place, out, load, more), **layout)
    assert all(result == (0, "") for result in results), results


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, rebuilt."""
    with RankFiles(folder) as files:
        kinds = ("model", "exp_avg", "exp_avg_sq")
        return {f"{kind}/{name}": files.read(name, kind) for kind in kinds for name in files.names(kind)}


def test_resume_on_the_same_layout_is_bit_for_bit(place):
    run(place, "same", "one/iter_0000002", NF4)
    ours, theirs = stored(place / "same/iter_0000004"), stored(place / "one/iter_0000004")
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any("linear_qkv.weight" in name for name in ours)


@pytest.mark.full
def test_resume_in_another_layout(place):
    more = f"{NF4} --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"
    run(place, "tp2", "one/iter_0000002", more, tp=2)
    losses = [[line["loss"] for line in metrics_of(place / out) if line["iteration"] > 2] for out in ("tp2", "one")]
    print(f"losses {losses}")
    assert len(losses[0]) == 2
    assert all(abs(a - b) <= LOSS * b for a, b in zip(*losses, strict=True))


@pytest.mark.full
def test_stored_codes_train_as_codes_made_on_load(place):
    """Four updates give the same losses and weights; without adapters such weights do not train."""
    hf2mg(place / "hf", place / "nf4", tp=2, pp=2, quantize="nf4", quantize_groups=("llm", "vision"))
    run(place, "stored", "nf4", "")
    assert metrics_of(place / "stored") == metrics_of(place / "one")
    ours, theirs = stored(place / "stored/iter_0000004"), stored(place / "one/iter_0000004")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ((code, message),) = run_distributed(train, arguments(place, "full", "nf4", "", peft=""))
    assert code == 1 and "holds linears in 4 bits, which do not train: train adapters on it" in message
