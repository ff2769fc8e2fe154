"""Whole runs: length, resume, signals, stage switches, evaluation, and errors that reach every rank."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_vlm.line_files import json_lines
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import damage_one_image, metrics_of, samples_of, train, train_with_signal
from megatron_vlm.weights.rank_files import RankFiles

TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
VALID = "--valid-data-path"


def run(argv: list[str], world: int = 1) -> None:
    """Runs to the end on ``world`` ranks."""
    assert run_distributed(train, argv, dp=world) == [(0, "")] * world


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the ranks of a checkpoint wrote."""
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.glob("rank*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_run_writes_what_it_says(command, tmp_path, valid_data):
    run(command("a", "--train-iters 3 --eval-interval 2", f"{VALID} {valid_data} --save {tmp_path / 'a'}"))
    assert [line["iteration"] for line in metrics_of(tmp_path / "a")] == [1, 2, 3]
    assert [line["consumed_samples"] for line in metrics_of(tmp_path / "a")] == [4, 8, 12]
    assert [line["iteration"] for line in metrics_of(tmp_path / "a", evaluations=True)] == [2, 3]
    resolved = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert resolved["optimizer"]["lr"] == 1e-3
    log = (tmp_path / "a" / "train.log").read_text()
    assert "<image> x 5" in log and "[[" in log and "<end_of_utterance>" in log
    assert "iteration 3/3 | loss" in log
    (start,) = json_lines(tmp_path / "a" / "starts.jsonl")
    assert (start["iteration"], start["total"], start["layout"]) == (0, 3, "tp 1 pp 1 dp 1")
    assert start["data"]["samples"] == 40 and min(start["trained"].values()) > 0 and "torch" in start["versions"]
    assert (tmp_path / "a" / "latest_checkpointed_iteration.txt").read_text().strip() == "3"


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        pytest.param(f"{TP2} --sequence-parallel", 2, marks=pytest.mark.full),
        pytest.param(f"{PP2} --decoder-layers-per-stage auto", 2, marks=pytest.mark.slow),
        (f"{PP2} --num-layers-per-virtual-pipeline-stage 1", 2),
        ("--use-distributed-optimizer --overlap-grad-reduce", 2),
        (f"{PP2} --vision-parallel ahead --recompute-granularity full", 2),
        pytest.param("--context-parallel-size 2 --use-distributed-optimizer", 2, marks=pytest.mark.full),
        ("parallel.data_parallel_sharding=parameters", 2),
        pytest.param(f"{TP2} --sequence_parallel_size 2 --context-parallel-exchange heads", 4, marks=pytest.mark.slow),
    ],
)
def test_layouts_train_and_evaluate_alike(command, tmp_path, valid_data, layout, world):
    """Held-out rows are uneven: 7 samples in rows of 2 on up to 2 replicas, and a group that stages must fill up."""
    more = ["--train-iters 3 --lr-warmup-iters 1 --lr-warmup-init 5e-4", f"{VALID} {valid_data}"]
    run(command("one", *more, "--global-batch-size 8"))
    run(command("many", *more, "--global-batch-size 8", layout), world)
    one, many = (json_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "many"))
    work = [[line["tflops"] * line["step_seconds"] for line in lines if "tflops" in line] for lines in (one, many)]
    assert work[0] == pytest.approx(work[1], rel=1e-12) and len(work[0]) == 3  # every row once, whoever has it
    if TP2 not in layout and PP2 not in layout:  # a copy of the model is counted once, as often as it is held
        starts = [json_lines(tmp_path / name / "starts.jsonl")[0]["trained"] for name in ("one", "many")]
        assert starts[0] == starts[1]
    if "auto" in layout:
        log, resolved = ((tmp_path / "many" / name).read_text() for name in ("train.log", "config.yaml"))
        assert "samples of the data" in log and isinstance(
            yaml.safe_load(resolved)["parallel"]["decoder_layers_per_stage"], list
        )
    for evaluations in (False, True):
        pairs = zip(metrics_of(tmp_path / "one", evaluations), metrics_of(tmp_path / "many", evaluations), strict=True)
        for one, many in pairs:
            tolerance = {"loss": 1e-5, "eval_loss": 1e-5, "grad_norm": 1e-3}
            for key, value in one.items():
                assert many[key] == pytest.approx(value, rel=tolerance.get(key, 1e-9)), key


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        pytest.param("", 1, marks=pytest.mark.slow),
        ("--use-distributed-optimizer", 2),
        pytest.param(PP2, 2, marks=pytest.mark.full),
    ],
)
def test_sigterm_on_one_rank_saves_on_all_and_the_run_goes_on_exactly(command, tmp_path, layout, world):
    more = ["--train-iters 12 --save-interval 100", layout]
    run(command("whole", *more, f"--save {tmp_path / 'whole'}"), world)
    argv = command("cut", *more, f"--save {tmp_path / 'cut'}")
    metrics = str(tmp_path / "cut" / "metrics.jsonl")
    codes = run_distributed(train_with_signal, argv, world - 1, metrics, 3, dp=world)
    assert codes == [(143, "")] * world
    stopped = metrics_of(tmp_path / "cut")[-1]["iteration"]
    assert 3 <= stopped < 12
    assert (tmp_path / "cut" / f"iter_{stopped:07d}" / "manifest.json").exists()
    with open(metrics, "a") as file:  # as a run that went on after its last checkpoint would leave it
        file.write(json.dumps({"iteration": stopped + 1, "loss": 0.0}) + "\n")
    run(command("cut", *more, f"--save {tmp_path / 'cut'}", load=tmp_path / "cut"), world)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert_same_weights(tmp_path / "cut" / "iter_0000012", tmp_path / "whole" / "iter_0000012")


CONTEXTS = ["", "--context-parallel-size 2", "", f"{TP2} --sequence-parallel --vision-parallel share"]
SHARDINGS = [
    "--data-parallel-sharding none --overlap-grad-reduce",
    "--use-distributed-optimizer",
    "--data-parallel-sharding parameters",
    f"{TP2} --sequence-parallel",
    "--use-distributed-optimizer --offload optimizer",
    "--data-parallel-sharding parameters --offload optimizer+parameters",
    "",
]


def train_watched(argv: list[str], folder: str) -> tuple[int, str]:
    """On a rank: ``train``, which writes down the samples of each step, and what it loaded as a checkpoint of its own."""
    from megatron_vlm.training.checkpoint.save import save_checkpoint
    from megatron_vlm.training.trainer import Trainer

    restore, commit = Trainer._restore, Trainer._commit

    def restored(self):
        restore(self)
        if self.found is not None:
            again = self.config.checkpoint.replace(save=f"{folder}/loaded")
            save_checkpoint(again, self.model, self.optimizer, {"iteration": self.iteration}, self.origin)

    def committed(self, skipped):
        if self.loader is not None:
            with open(f"{folder}/samples{self.topology.rank}", "a") as file:
                file.writelines(f"{self.iteration} {sample}\n" for sample in self.sample_ids)
        commit(self, skipped)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_restore", restored)
        patch.setattr(Trainer, "_commit", committed)
        return train(argv)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, rebuilt; main parameters of fp32 are its weights."""
    with RankFiles(folder) as files:
        kinds = ("model", "param", "exp_avg", "exp_avg_sq")
        return {f"{kind}/{name}": files.read(name, kind) for kind in kinds for name in files.names(kind)}


def samples(folder: Path) -> list[str]:
    return sorted({line for path in folder.glob("samples*") for line in path.read_text().splitlines()})


@pytest.mark.parametrize("layouts", [CONTEXTS, pytest.param(SHARDINGS, marks=pytest.mark.full)], ids=["cp", "sharding"])
def test_a_run_goes_on_in_other_layouts(command, tmp_path, layouts):
    """Other cp, or other shares of data parallel ranks: each loads the state before bit for bit, and takes the same samples in
    the same order; losses are those of one rank."""
    more = ["--lr-decay-iters 12 --save-interval 100"]
    for name, legs in (("whole", [""]), ("parts", layouts)):
        (tmp_path / name).mkdir()
        for number, layout in enumerate(legs):
            load = {"load": tmp_path / name} if number else {}
            end = 2 * len(layouts) if name == "whole" else 2 * number + 2
            argv = command(name, f"--train-iters {end}", *more, layout, f"--save {tmp_path / name}", **load)
            world = 1 if layout == "" else 2
            assert run_distributed(train_watched, argv, str(tmp_path / name), dp=world) == [(0, "")] * world
            if number:
                before, after = (state_of(tmp_path / name / path / f"iter_{2 * number:07d}") for path in ("", "loaded"))
                assert all(torch.equal(after[key], before[key]) for key in before.keys() & after.keys()), layout
                assert {key for key in before.keys() ^ after.keys() if not key.startswith("param/")} == set(), layout
    assert samples(tmp_path / "whole") == samples(tmp_path / "parts") != []
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    same = ("iteration", "tokens", "supervised_tokens", "images", "consumed_samples", "holes", "lr")
    assert [[line[key] for key in same] for line in parts] == [[line[key] for key in same] for line in whole]
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    last = f"iter_{2 * len(layouts):07d}"
    states = [json.loads((tmp_path / name / last / "state.json").read_text()) for name in ("whole", "parts")]
    assert states[0]["run"]["data"] == states[1]["run"]["data"]


@pytest.mark.full
@pytest.mark.parametrize("more", ["--bf16", "--bf16 peft.target_modules=all-linear peft.r=4"], ids=["full", "adapters"])
def test_weights_on_the_host_go_on_bit_for_bit(command, tmp_path, more):
    """A preset of the guides as asked; cut in two, against the same shards on the device."""
    whole, host = tmp_path / "whole", tmp_path / "host"
    common = f"{more} --lr-decay-iters 12 --max-grad-norm 1.0"
    run(command("whole", f"--train-iters 4 --data-parallel-sharding parameters {common} --save {whole}"), 2)
    run(command("host", f"--train-iters 2 --deepspeed zero3_offload {common} --save {host}"), 2)
    run(command("host", f"--train-iters 4 --deepspeed zero3_offload {common} --save {host}", load=host), 2)
    resolved = yaml.safe_load((host / "config.yaml").read_text())["parallel"]
    assert (resolved["data_parallel_sharding"], resolved["offload"]) == ("parameters", "optimizer+parameters")
    assert metrics_of(host) == metrics_of(whole)
    assert_same_weights(host / "iter_0000004", whole / "iter_0000004")


def test_stage_switch_starts_schedule_samples_and_clipping_anew(command, tmp_path):
    save = f"--save {tmp_path / 'first'}"
    schedule = "--lr-warmup-iters 2 --lr-warmup-init 1e-4 --clip-grad 0.01"
    run(command("first", "--train-iters 4 --freeze-llm --freeze-clip-vision-tower", schedule, save))
    run(command("second", "--train-iters 5 --finetune", schedule, load=tmp_path / "first"))
    first, second = metrics_of(tmp_path / "first"), metrics_of(tmp_path / "second")
    assert [line["consumed_samples"] for line in second] == [4, 8, 12, 16, 20]
    assert [line["tokens"] for line in second[:4]] == [line["tokens"] for line in first]
    assert second[0]["lr"] == pytest.approx(1e-4) and second[2]["lr"] == pytest.approx(1e-3)
    assert second[0]["loss"] != first[0]["loss"]  # the weights of the first stage
    assert all(line["grad_norm"] > 0.01 for line in first + second)  # before clipping
    log = (tmp_path / "second" / "train.log").read_text()
    assert "started anew: optimizer, schedule, iteration, data order and seed" in log


def test_unfreezing_in_mid_run_goes_on_and_says_what_was_reset(command, tmp_path):
    save = f"--save {tmp_path / 'a'}"
    run(command("a", "--train-iters 2 --lr-decay-iters 8 --freeze-llm", save))
    run(command("b", "--train-iters 4 --lr-decay-iters 8", load=tmp_path / "a"))
    assert [line["iteration"] for line in metrics_of(tmp_path / "b")] == [3, 4]
    assert [line["consumed_samples"] for line in metrics_of(tmp_path / "b")] == [12, 16]
    log = (tmp_path / "b" / "train.log").read_text()
    assert "optimizer state reset (zero moments, Adam step 0): llm" in log


@pytest.mark.parametrize("freeze", ["--freeze-llm", "--freeze-llm --freeze-clip-vision-tower --freeze-perceiver"])
def test_stages_without_trainable_parameters(command, tmp_path, freeze):
    run(command("one", "--train-iters 2", freeze))
    run(command("two", "--train-iters 2", freeze, PP2, f"--save {tmp_path / 'two'}"), 2)
    run(command("two", "--train-iters 3", freeze, PP2, load=tmp_path / "two"), 2)
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_length_in_samples_and_epochs_and_saving_each_epoch(command, tmp_path):
    run(command("samples", "--train-samples 9"))
    assert [line["consumed_samples"] for line in metrics_of(tmp_path / "samples")] == [4, 8, 12]
    run(command("epochs", f"--train-epochs 2 --global-batch-size 20 --save-epochs 1 --save {tmp_path / 'epochs'}"))
    lines = metrics_of(tmp_path / "epochs")
    assert [line["consumed_samples"] for line in lines] == [20, 40, 60, 80]
    assert sorted(path.name for path in (tmp_path / "epochs").glob("iter_*")) == ["iter_0000002", "iter_0000004"]


def test_a_sample_that_goes_bad_is_a_hole_where_the_config_says_skip(command, tmp_path, train_data):
    """Each epoch passes it once: nothing else moves."""
    damaged = damage_one_image(train_data, tmp_path / "data")
    run(command("whole", "--train-epochs 2"))
    run(command("holes", "--train-epochs 2 --on-bad-sample skip", f"--data-path {damaged.parent}"))
    whole, holes = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "holes")
    assert sum(line["holes"] for line in holes) == 2
    assert [line["consumed_samples"] for line in holes] == [line["consumed_samples"] for line in whole]
    same = [a["tokens"] == b["tokens"] for a, b in zip(holes, whole, strict=True)]
    assert same == [line["holes"] == 0 for line in holes]


def test_skip_train_equals_hf_on_the_same_samples(command, tmp_path, twin, valid_data):
    run(command("eval", f"--skip-train {VALID} {valid_data}"), 2)
    run(command("half", f"--skip-train {VALID} {valid_data} --eval-iters 1"))
    (line,) = metrics_of(tmp_path / "eval", evaluations=True)
    assert line["iteration"] == 0
    assert line["eval_loss"] == pytest.approx(hf_loss(twin, valid_data), rel=2e-6)
    assert metrics_of(tmp_path / "half", evaluations=True)[0]["eval_loss"] != pytest.approx(line["eval_loss"], rel=1e-4)


def shards_at_load(argv: list[str]) -> tuple[tuple[int, str], list[float]]:
    """On a rank: what ``train`` returns, and the share of the weights that it held when they came."""
    from megatron_vlm.conversion import load
    from megatron_vlm.parallel.shards import held

    load_into, found = load.load_into, []

    def watched(source, model, added):
        sizes = [(p.nbytes, held(p)[0].nbytes) for _, p in model.named_parameters()]
        found.append(sum(size for _, size in sizes) / sum(size for size, _ in sizes))
        load_into(source, model, added)

    load.load_into = watched
    try:
        return train(argv), found
    finally:
        load.load_into = load_into


def test_a_model_in_shards_is_never_whole_trained_or_not(command, tmp_path, twin, valid_data):
    """Main parameters of bf16 come finer than the weights; with --skip-train there is no optimizer."""
    for more in ("--train-iters 1 --bf16", "--skip-train"):
        argv = command("a", more, f"--data-parallel-sharding gradients {VALID} {valid_data}")
        for code, found in run_distributed(shards_at_load, argv, dp=2):
            assert code == (0, "") and found == [pytest.approx(0.5, abs=0.01)]
    (line,) = (line for line in metrics_of(tmp_path / "a", evaluations=True) if line["iteration"] == 0)
    assert line["eval_loss"] == pytest.approx(hf_loss(twin, valid_data), rel=2e-6)


@pytest.mark.parametrize("sharding", ["parameters", pytest.param("gradients", marks=pytest.mark.full)])
@pytest.mark.parametrize("base", [pytest.param("", marks=pytest.mark.full), "peft.quantize=nf4"], ids=["lora", "nf4"])
def test_a_base_of_adapters_in_shards_is_never_whole(command, tmp_path, base, sharding):
    """In 4 bits codes and scales are cut before they come, too; losses are those of a rank that holds all of it."""
    more = f"--train-iters 2 peft.target_modules=all-linear peft.r=2 {base}"
    run(command("whole", more))
    argv = command("cut", f"{more} --data-parallel-sharding {sharding}")
    for code, found in run_distributed(shards_at_load, argv, dp=2):
        assert code == (0, "") and found == [pytest.approx(0.5, abs=0.01)]
    for cut, whole in zip(metrics_of(tmp_path / "cut"), metrics_of(tmp_path / "whole"), strict=True):
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_skip_train_leaves_the_metrics_of_a_run_alone(command, tmp_path, valid_data):
    run(command("a", f"--train-iters 2 --save {tmp_path / 'a'}"))
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    run(command("a", f"--skip-train {VALID} {valid_data}", load=tmp_path / "a"))
    after = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert after.startswith(before) and json.loads(after.splitlines()[-1])["iteration"] == 2


def hf_loss(twin: Path, data: Path) -> float:
    """Mean token loss of HF over shards, one sample at a time."""
    from transformers import Idefics2ForConditionalGeneration

    from megatron_vlm.data.config import DataConfig
    from megatron_vlm.data.stream.loader import evaluation_rows
    from megatron_vlm.models.families.idefics2.processor import Idefics2Processor
    from megatron_vlm.testing.parity import hf_reference

    config = DataConfig(valid=(str(data),), seq_length=96, shortest_edge=24, num_workers=0)
    processor = Idefics2Processor.from_pretrained(twin, config)
    rows = evaluation_rows(config, processor, paths=config.valid, dp_rank=0, dp_size=1, micro_batch_size=1)
    samples = [sample for row in rows for sample in samples_of(row, processor.image_seq_len)]
    model = Idefics2ForConditionalGeneration.from_pretrained(twin, attn_implementation="eager").eval()
    return hf_reference(model, samples, gradients=False)[0]
