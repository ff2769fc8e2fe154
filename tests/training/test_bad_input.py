"""What users get wrong: with two ranks, each raises an error that names the culprit, and none waits for the other.

The pool gives every case 60 seconds; a rank that hangs fails the test.
"""

import re
import shutil
from pathlib import Path

import pytest

from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import damage_one_image, metrics_of, train
from tests.training.checkpoint.ranks import train_without_room

TP2 = "--tensor-model-parallel-size 2"


def errors(argv: list[str], world: int = 2) -> list[str]:
    """Error text of each rank; all must fail."""
    results = run_distributed(train, argv, dp=world, timeout=60)
    assert [code for code, _ in results] == [1] * world, results
    return [text for _, text in results]


@pytest.fixture
def damaged_twin(twin, tmp_path) -> Path:
    """A copy of the twin that a case may damage."""
    return Path(shutil.copytree(twin, tmp_path / "damaged"))


CASES = {
    "missing model": (["--load /no/such/model"], "ConversionError: .*no/such/model"),
    "missing data": (["data.train=[/no/such/data]"], "DataError: .*no/such/data"),
    "missing config file": (["--config /no/such/file.yaml"], "ConfigError: .*no/such/file.yaml"),
    "wrong family": (["--family idefics2_llama3"], "ConversionError: .*idefics2.*not idefics2_llama3"),
    "unknown family": (["--family idefics3"], "did you mean 'idefics2'"),
    "unknown key": (["optimizer.learning_rate=1"], "unknown config key 'optimizer.learning_rate'"),
    "unknown flag": (["--learning-rat 1"], "unknown flag --learning-rat"),
    "wrong type": (["--lr fast"], "optimizer.lr must be float, got 'fast'"),
    "world size": (["--tensor-model-parallel-size 4"], "world size 2 is not a multiple of .* 4 x 1 = 4: start 4 ranks"),
    "batch size": (["--global-batch-size 6"], "global_batch_size 6 is not a multiple of .* 2 x .* 2 = 4: set it to 8"),
    "layers over stages": (
        ["--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3"],
        "4 decoder layers do not divide over 2 pipeline stages of num_layers_per_virtual_pipeline_stage 3 layers",
    ),
    "microbatches of virtual stages": (
        ["--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 6"],
        "multiple of 2 microbatches per rank, got 3",
    ),
    "sequence too long": (["--seq-length 4096"], "seq_length 4096 is above .* 1024: set it to at most 1024"),
    "sample too long": (["--seq-length 16"], "DataError: .*(seq_length|16)"),
    "fp16 on the CPU": (["--fp16"], "fp16 does not run on the CPU"),
    "packing and micro batch": (["--packing"], "micro_batch_size must be 1, got 2"),
    "two lengths": (["--train-samples 8"], "set one of"),
    "evaluation without data": (["--eval-interval 2"], "data.valid is empty"),
    "context parallel": (
        ["--context-parallel-size 4"],
        "not a multiple of tensor x context x pipeline .* 1 x 4 x 1 = 4",
    ),
    "save that cannot be written": (["--save /proc/out"], "ConfigError: checkpoint.save /proc/out cannot be written"),
    "output that is a file": (
        ["--output-dir /etc/hostname"],
        "ConfigError: logging.output_dir /etc/hostname: .* is no folder",
    ),
    "checkpoint that is absent": (["--ckpt-step 7"], "--ckpt-step"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_error_names_the_culprit_on_every_rank(command, name):
    more, wanted = CASES[name]
    for text in errors(command("out", "--train-iters 2", *more)):
        assert re.search(wanted, text, re.DOTALL), text


def test_a_checkpoint_that_will_not_fit_is_found_before_the_first_step(command, tmp_path):
    argv = command("out", f"--train-iters 2 --save {tmp_path / 'out'}")
    for _, text in run_distributed(train_without_room, argv, 1000, dp=2, timeout=60):
        assert re.search(r"a checkpoint takes about 0\.0\d GB, and .*out has 0\.00 GB free", text), text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_folder_of_another_run_is_left_alone(command, twin, tmp_path):
    """Before the first step, with both named; a run that stops at 2 would leave a tracker that names its own."""
    kept = tmp_path / "other" / "iter_0000005"
    kept.mkdir(parents=True)
    for text in errors(command("out", f"--train-iters 2 --save {tmp_path / 'other'}")):
        assert text.startswith("ConfigError: ") and f"starts at 0 from {twin}" in text, text
        assert f"{tmp_path / 'other'} holds checkpoints of another run (iterations 5)" in text
        assert f"--load {tmp_path / 'other'}" in text and "another folder (--save)" in text
    assert not (tmp_path / "out" / "metrics.jsonl").exists() and list((tmp_path / "other").glob("iter_*")) == [kept]


def test_a_source_that_is_never_read(command, train_data):
    for text in errors(command("out", "--train-iters 2", f"--data-path 1 {train_data} 0.0001 {train_data}")):
        wanted = rf"ConfigError: .*1 epoch\) never reads.*{train_data} \(2\): \d+ samples, share 0\.0\d+ of a sample an epoch"
        assert re.search(wanted, text, re.DOTALL), text


def test_heads_that_do_not_divide(command, tmp_path):
    from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

    write_tiny_idefics2(tmp_path / "odd", layers=1, heads=3, kv_heads=3, text_hidden=48, vision_layers=1, depth=1)
    for text in errors(command("out", "--train-iters 2", TP2, load=tmp_path / "odd")):
        assert "ConfigError" in text and "3" in text and "tensor" in text, text


def test_truncated_safetensors(command, damaged_twin):
    path = damaged_twin / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    for text in errors(command("out", "--train-iters 2", load=damaged_twin)):
        assert "model.safetensors" in text, text


def test_missing_tokenizer(command, damaged_twin):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (damaged_twin / name).unlink(missing_ok=True)
    for text in errors(command("out", "--train-iters 2", load=damaged_twin)):
        assert "tokenizer" in text, text


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_on_one_replica_stops_all_ranks(command, tmp_path, train_data, workers):
    shard = damage_one_image(train_data, tmp_path / "data")
    texts = errors(command("out", f"--train-epochs 1 --num-workers {workers}", f"--data-path {shard.parent}"))
    assert len(set(texts)) == 1
    assert texts[0].startswith("DataError: ") and str(shard) in texts[0] and "damaged" in texts[0], texts[0]
    assert metrics_of(tmp_path / "out")[-1]["iteration"] >= 1  # it fails in mid-run


def test_placeholders_that_differ_from_the_images(command, tmp_path, train_data):
    data = tmp_path / "data"
    shutil.copytree(train_data, data, ignore=shutil.ignore_patterns("*.tokens.npy"))
    for path in data.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"What is", b"<image>"))  # the sizes still agree
    for text in errors(command("out", "--train-iters 3", f"--data-path {data}")):
        assert text.startswith("DataError: ") and "placeholders" in text, text


def test_a_loss_that_is_not_finite_stops_all_ranks_and_writes_nothing(command, tmp_path):
    argv = command("out", f"--train-iters 5 --lr 1e30 --clip-grad 0 --save {tmp_path / 'out'}")
    for text in errors(argv):
        assert text.startswith("TrainingError: ") and "is not finite" in text and "optimizer.lr" in text
    assert list((tmp_path / "out").glob("iter_*")) == []


def out_of_memory(argv: list[str]) -> str:
    """Trains with a model whose second row asks the real allocator for a petabyte."""
    import torch

    from megatron_vlm.errors import TrainingError
    from megatron_vlm.options.resolve import resolve
    from megatron_vlm.parallel.heartbeat import Heartbeat
    from megatron_vlm.training.trainer import Trainer

    trainer = Trainer(resolve(argv)[0], Heartbeat())
    calls = []

    def hook(*_) -> None:
        calls.append(1)
        if len(calls) == 2:
            torch.empty(1 << 50, dtype=torch.uint8)

    trainer.model.stages[0].module.register_forward_pre_hook(hook)
    try:
        trainer.train()
    except TrainingError as error:
        return str(error)
    finally:
        trainer.close()
    return ""


def test_out_of_memory_names_row_samples_and_what_to_lower(command):
    (text,) = run_distributed(out_of_memory, command("out", "--train-iters 2"))
    for part in ("rank 0", "tokens", "images, the largest", "samples: records-", "peak memory", "GiB"):
        assert part in text, text
    order = [
        "micro_batch_size",
        "seq_length",
        "max_image_num",
        "image_size",
        "recompute_granularity",
        "data_parallel_sharding",
    ]
    assert [text.index(name) for name in order] == sorted(text.index(name) for name in order)
