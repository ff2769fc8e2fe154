"""Each check fails on purpose: exit code 1 before any process of the run starts, the culprit named, and what to do."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from megatron_vlm.launch.checks import Report, check_host
from tests.launch.conftest import write_records


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), 10)


def assert_not_started(code: int, output: str, folder: Path, *words: str) -> None:
    assert code == 1, output
    for word in words:
        assert word in output, output
    assert not (folder / "out").exists()  # config, log and checkpoints of a run lie there


def test_no_launch_passes_and_starts_nothing(launch, data, tmp_path):
    code, output = launch(f"--train_json {data} --max_steps 3 --no-launch --deepspeed deepspeed_zero3_offload")
    assert code == 0, output
    for word in ("10 sound records", "layout     tp 1 pp 1 dp 1", "3 updates", "activations", "-m megatron_vlm train"):
        assert word in output, output
    assert "with offload of optimizer state" in output and "fits like this as well, and is faster" in output, output
    assert "--strict-sharding" in output, output
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_what_was_asked_is_kept_where_the_run_would_shard_or_offload_anyway(launch, data):
    words = f"--train_json {data} --max_steps 3 --no-launch --num_processes 2 --deepspeed deepspeed_zero2"
    code, output = launch(f"{words} --memory_gib 0.0009")
    assert code == 0 and "the run does not fit without sharding or offload" in output, output
    said = [line for line in output.splitlines() if line.startswith(("note ", "ok "))]
    assert len(said) == len(set(said)), output  # though the plan was made twice
    assert "becomes parallel.data_parallel_sharding=gradients" in output and "as well" not in output, output
    code, output = launch(f"{words} --memory_gib 0.0014")  # recomputes on 2 stages: who knows which is faster
    assert code == 0 and "fits like this as well: " in output and "recompute" in output, output


def test_package_missing(launch, data, tmp_path):
    code, output = launch(f"--train_json {data} --max_steps 3 --report_to wandb --no-launch")
    assert_not_started(code, output, tmp_path, "wandb is not installed", "--report_to wandb", "pip install wandb")


def test_shard_of_the_model_missing(launch, data, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    shard.unlink()
    code, output = launch(f"--train_json {data} --max_steps 3", source=copy)
    assert_not_started(code, output, tmp_path, "FAILED   model", shard.name, "download_model.sh")


def test_tokenizer_missing(launch, data, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "tokenizer.json").unlink()
    code, output = launch(f"--train_json {data} --max_steps 3", source=copy)
    assert_not_started(code, output, tmp_path, "FAILED   processor", str(copy), "tokenizer.json")


@pytest.mark.parametrize("mode", ["", "--no-launch"])
def test_one_record_of_a_thousand_is_bad(launch, tmp_path, mode):
    path = write_records(tmp_path / "data", 1000)
    records = json.loads(path.read_text())
    records[500]["image"] = "nowhere.png"
    path.write_text(json.dumps(records))
    code, output = launch(f"--train_json {path} --max_steps 3 {mode}")
    assert_not_started(
        code, output, tmp_path, "FAILED   data", "record 500", "nowhere.png", "1 problems in 1000", "skip"
    )


def test_busy_port_is_replaced(launch, data):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        two = "--num_processes 2 --gradient_accumulation_steps 1"
        code, output = launch(f"--train_json {data} --max_steps 3 {two} --master_port {port} --no-launch")
    assert code == 0 and f"warning  port       {port} is in use" in output, output
    command = next(line for line in output.splitlines() if "megatron_vlm.launch.agent" in line)
    assert f"--master-port {port}" not in command and "--nproc-per-node 2" in command


def test_too_little_memory(launch, data, tmp_path):
    code, output = launch(f"--train_json {data} --max_steps 3 --memory_gib 0.0005")
    assert_not_started(code, output, tmp_path, "FAILED   memory", "0.0 GiB", "--use_lora")


@pytest.mark.parametrize("by", ["--global-batch-size 32", "--deepspeed FILE"])
def test_layouts_that_contradict_the_batch_are_no_candidates(launch, data, tmp_path, by):
    """InternVL3's own numbers on two processes: 4 per device x accumulation 4 x dp 2 = 32; tp 2 x dp 1 would be 16."""
    (tmp_path / "ds.json").write_text('{"train_batch_size": 32}')
    words = "--num_processes 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 4"
    words = f"{words} {by.replace('FILE', str(tmp_path / 'ds.json'))} --train_json {data} --max_steps 3 --no-launch"
    code, output = launch(words)
    assert code == 0 and "layout     tp 1 pp 1 dp 2" in output, output
    assert "4 samples x 4 microbatches x dp 2 = 32 samples an update" in output
    # Four processes: dp 4 contradicts the batch, a layout with dp 2 does not.
    code, output = launch(words.replace("processes 2", "processes 4"))
    assert code == 0 and " dp 2: " in output and "= 32 samples an update" in output, output
    code, output = launch(words.replace("steps 4", "steps 5"))
    assert_not_started(code, output, tmp_path, "FAILED   settings", "x accumulation 5 x 2 data parallel replicas = 40")


def test_each_failure_keeps_its_own_name(launch, data, tmp_path):
    """A mistyped target is found where memory is estimated, and is no want of memory."""
    code, output = launch(f"--train_json {data} --max_steps 3 --use_lora True --lora_target_modules q_prooj")
    assert_not_started(code, output, tmp_path, "FAILED   settings", "q_prooj")
    assert "FAILED   memory" not in output and "take more or larger GPUs" not in output
    code, output = launch(f"--train_json {data} --max_steps 3 --num_processes 5 --global-batch-size 4")
    assert_not_started(code, output, tmp_path, "FAILED   settings", "no layout of 5 ranks divides", "multiple of")
    assert "larger GPUs" not in output


def test_disk_full(launch, data, tmp_path):
    code, output = launch(f"--train_json {data} --max_steps 1000000000 --save_steps 1")
    assert_not_started(
        code, output, tmp_path, "FAILED   disk", "1000000000 checkpoints", "GB free", "--save_total_limit"
    )


def test_outputs_that_cannot_be_written(launch, data, tmp_path):
    (tmp_path / "file").touch()
    words = f"--train_json {data} --max_steps 3 --output_dir {tmp_path / 'file'} --tensorboard-dir /proc/tb"
    code, output = launch(words)
    assert_not_started(
        code, output, tmp_path, "FAILED   output", "/proc/tb cannot be written", f"{tmp_path / 'file'} is no"
    )
    assert not (tmp_path / "cache").exists()
    # Checkpoints, reports and TensorBoard go to one folder: one fault, one line.
    code, output = launch(f"--train_json {data} --max_steps 3 --output_dir {tmp_path / 'file'} --no-launch")
    assert code == 1 and output.count("FAILED") == 1 and "1 of the checks failed" in output, output
    assert f"logging.output_dir, checkpoint.save {tmp_path / 'file'}: {tmp_path / 'file'} is no folder" in output


def test_no_gpu(launch, data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without the driver's tools
    code, output = launch(f"--train_json {data} --max_steps 3", device=None)
    assert_not_started(code, output, tmp_path, "FAILED   devices", "no GPU", "--device cpu")


def test_both_sharding_options(launch, data, tmp_path):
    code, output = launch(f"--train_json {data} --max_steps 3 --use_deepspeed True --use_fsdp True")
    assert_not_started(code, output, tmp_path, "deepspeed", "fsdp")


def test_settings_that_contradict_each_other(launch, data, tmp_path):
    code, output = launch(f"--train_json {data} --max_steps 5 optimizer.lr_warmup_iters=30")
    assert_not_started(code, output, tmp_path, "FAILED   settings", "warm-up of 30 iterations")


def test_all_failures_are_told_at_once(launch, tmp_path):
    code, output = launch(f"--train_json {tmp_path / 'no.json'} --max_steps 3 --report_to wandb")
    assert_not_started(
        code, output, tmp_path, "wandb", f"{tmp_path / 'no.json'} does not exist", "2 of the checks failed"
    )


def test_a_host_without_room_for_the_optimizer():
    report = Report()
    check_host(report, 1 << 30, "optimizer")
    assert not report.failed
    check_host(report, 1 << 50, "optimizer")
    check_host(report, 1 << 50, "optimizer+parameters")
    first, second = (finding.advice for finding in report.failed)
    assert "offload_fraction" in first and "offload_fraction" not in second  # which it cannot have
