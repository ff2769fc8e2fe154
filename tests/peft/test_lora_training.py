"""Whole runs with adapters: what their checkpoints hold and cost, resume in any layout, the base they need."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.digests import sealed
from megatron_vlm.files import file_digest
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import adapted_plan
from megatron_vlm.testing.runs import metrics_of, train, write_shards
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.weights.rank_files import RankFiles

SETTINGS = dict(target_modules=("q_proj", "v_proj", "down_proj"), modules_to_save=("modality_projection",), r=2)
PEFT = "peft.target_modules=[q_proj,v_proj,down_proj] peft.modules_to_save=[modality_projection] peft.r=2"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an HF twin ``hf`` and shards of samples."""
    folder = tmp_path_factory.mktemp("lora")
    write_tiny_idefics2(folder / "hf")
    write_shards(folder / "data", 24, seed=1)
    return folder


@pytest.fixture(scope="module")
def command(place):
    """``command(out, more, load)`` -> arguments of a small run that saves to ``place / out``."""

    def make(out: str, more: str, load: Path | None = None) -> list[str]:
        base = (
            f"--load {load or place / 'hf'} --data-path {place / 'data' / 'shards'} --seq-length 96 --micro-batch-size 2 "
            f"--global-batch-size 4 --lr 1e-3 --lr-decay-iters 10 --shortest-edge 24 --num-workers 0 --device cpu "
            f"--no-tensorboard --output-dir {place / out} --save {place / out} --make-vocab-size-divisible-by 8"
        )
        return [*base.split(), *more.split()]

    return make


def run(argv: list[str], **layout: int) -> None:
    results = run_distributed(train, argv, **layout)
    assert all(result == (0, "") for result in results), results


def fails(argv: list[str]) -> str:
    ((code, message),) = run_distributed(train, argv)
    assert code == 1
    return message


@pytest.fixture(scope="module")
def trained(place, command):
    """Folder of a run of 4 updates that saved after 2 and 4."""
    run(command("one", f"{PEFT} peft.dropout=0.1 --train-iters 4 --save-interval 2"))
    return place / "one"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, rebuilt."""
    with RankFiles(folder) as files:
        kinds = ("model", "exp_avg", "exp_avg_sq")
        return {f"{kind}/{name}": files.read(name, kind) for kind in kinds for name in files.names(kind)}


def test_checkpoints_hold_what_trains_alone(place, trained):
    with open_source(place / "hf") as source:
        names = adapted_plan(source, SETTINGS).names
        whole = sum(info.nbytes for info in source.infos.values())
    tensors = stored(trained / "iter_0000004")
    assert {name.partition("/")[2] for name in tensors} == names
    trainable = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("model/"))
    state = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("model/"))
    size = sum(path.stat().st_size for path in (trained / "iter_0000004").glob("rank*.safetensors"))
    print(
        f"{trainable:,} of {whole // 4:,} parameters train; bytes: rank files {size:,} = {size / trainable:.1f} for each, "
        f"optimizer state {state:,} = {state / trainable:.1f}"
    )
    assert state == 8 * trainable  # AdamW's two moments in fp32, whose weights are their own main parameters
    assert 12 * trainable <= size <= 12 * trainable + 1000 * len(names)  # and a header
    start = stored(trained / "iter_0000002")
    assert all(not torch.equal(start[name], tensors[name]) for name in tensors if name.startswith("model/"))


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ({}, ""),
        (dict(tp=2), "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"),
        pytest.param(dict(pp=2, dp=2), "--pipeline-model-parallel-size 2", marks=pytest.mark.full),
    ],
    ids=["same", "tp2", "pp2dp2"],
)
def test_resume(command, trained, place, layout, more):
    """Same layout: bit for bit, dropout included. Another: without dropout, whose masks go by the layout."""
    exact = not layout
    dropout = "peft.dropout=0.1" if exact else "peft.dropout=0"
    reference = trained
    if not exact:
        reference = place / "no_dropout"
        if not reference.exists():
            run(command("no_dropout", f"{PEFT} --train-iters 4", trained / "iter_0000002"))
    out = f"resumed_{len(more)}"
    run(command(out, f"{PEFT} {dropout} {more} --train-iters 4", trained / "iter_0000002"), **layout)
    ours, theirs = (stored(folder / "iter_0000004") for folder in (place / out, reference))
    assert ours.keys() == theirs.keys()
    for one, other in zip(metrics_of(place / out), metrics_of(reference)[-2:], strict=True):
        assert one["iteration"] == other["iteration"] and one["consumed_samples"] == other["consumed_samples"]
        assert one["loss"] == pytest.approx(other["loss"], rel=0 if exact else 1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0 if exact else 1e-3)
    if exact:
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_base_moves_and_must_not_change(command, trained, place):
    folder = place / "moved"
    shutil.copytree(trained / "iter_0000004", folder)
    state = json.loads((folder / "state.json").read_text())
    state["peft"]["base"]["path"] = str(place / "gone")
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = file_digest(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert "is not at" in fails(command("x", f"{PEFT} --train-iters 5", folder))
    write_tiny_idefics2(place / "other", seed=1)
    message = fails(command("x", f"{PEFT} --train-iters 5 checkpoint.base={place / 'other'}", folder))
    assert "holds other weights than the base" in message
    run(command("y", f"{PEFT} --train-iters 5 checkpoint.base={place / 'hf'}", folder))
    assert json.loads((place / "y/iter_0000005/state.json").read_text())["peft"]["base"]["path"] == str(place / "hf")


def test_checkpoint_and_settings_must_agree(command, trained):
    assert "peft describes (r 2 -> 4)" in fails(command("x", f"{PEFT.replace('r=2', 'r=4')} --train-iters 5", trained))
    assert "or checkpoint.finetune (--finetune)" in fails(command("x", "--train-iters 5", trained))
    assert "freeze_llm together with peft" in fails(command("x", f"{PEFT} --freeze-llm --train-iters 5"))


@pytest.mark.full
def test_the_merged_model_trains_in_full(command, trained, place):
    """--finetune without a section peft; and new adapters on such a full checkpoint."""
    run(command("full", "--train-iters 1 --finetune --no-save-optim", trained))
    first = metrics_of(place / "full")[0]["loss"]
    run(command("again", f"{PEFT} --train-iters 1", place / "full"))
    with open_source(trained) as merged, open_source(place / "again") as again, open_source(place / "hf") as base:
        name = "language_model.decoder.layers.0.mlp.linear_fc2.weight"
        assert not torch.equal(merged.read(name), base.read(name))
        assert again.base.directory == place / "full" / "iter_0000001"
    assert first < metrics_of(trained)[0]["loss"]


def test_a_run_goes_on_from_an_adapter_of_peft(command, place):
    """What starts is what PEFT wrote: an update too small to see leaves every tensor as it was."""
    from peft import LoraConfig, get_peft_model
    from transformers import Idefics2ForConditionalGeneration

    model = get_peft_model(
        Idefics2ForConditionalGeneration.from_pretrained(place / "hf"),
        LoraConfig(r=3, target_modules=["k_proj", "fc1"], modules_to_save=["modality_projection"]),
    )
    generator = torch.Generator().manual_seed(3)
    expected = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            expected[name.replace(".default", "").replace(".modules_to_save", "")] = parameter.detach()
    model.save_pretrained(place / "adapter")
    tp2 = "--tensor-model-parallel-size 2"
    run(command("on", f"peft.adapter={place / 'adapter'} --train-iters 1 --lr 1e-30 {tp2}"), tp=2)
    with open_source(place / "on") as source:
        pairs = {f"base_model.model.{module}": pair for module, pair in source.adapter.pairs.items()}
        ours = {
            f"{module}.lora_{half}.weight": getattr(pair, half.lower())
            for module, pair in pairs.items()
            for half in "AB"
        }
        ours |= {f"base_model.model.{name}": tensor for name, tensor in source.adapter.full.items()}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.full
def test_adapters_are_fp32_over_a_16_bit_base(command, place, trained):
    """As PEFT's are; modules trained in full keep the base's dtype and have fp32 main parameters beside it."""
    more = "--train-iters 2 --bf16 --use-distributed-optimizer"
    run(command("bf16", f"{PEFT} peft.dropout=0.1 {more}"), dp=2)
    with RankFiles(place / "bf16" / "iter_0000002") as files:
        for name in files.names():
            pair = ".lora." in name
            assert files.info(name).dtype == (torch.float32 if pair else torch.bfloat16), name
            assert files.has(name, "param") == (not pair) and files.info(name, "exp_avg").dtype == torch.float32
        again = command("bf16_on", f"{PEFT} peft.dropout=0.1 {more.replace('2', '3', 1)}", place / "bf16")
    run(again, dp=2)
    whole, resumed = metrics_of(trained), metrics_of(place / "bf16") + metrics_of(place / "bf16_on")
    for exact, coarse in zip(whole, resumed, strict=False):
        assert coarse["loss"] == pytest.approx(exact["loss"], rel=0.05)
