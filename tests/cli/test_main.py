"""The command as a process of its own: exit codes, messages without traceback, and no rank that outlives another."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vlm.cli.main import COMMANDS, MEANT, main
from megatron_vlm.testing import commands
from megatron_vlm.testing.runs import metrics_of, write_shards


@pytest.fixture(scope="module")
def run_argv(tmp_path_factory):
    """``run_argv(out, *more)``: arguments of a small run on two replicas."""
    from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

    folder = tmp_path_factory.mktemp("cli")
    write_tiny_idefics2(folder / "twin", layers=2)
    data = write_shards(folder / "data", 24, seed=3)

    def make(out: Path, *more: str) -> list[str]:
        base = (
            f"--load {folder / 'twin'} --data-path {data} --seq-length 96 --global-batch-size 4 --lr 1e-3 --shortest-edge 24 "
            f"--num-workers 1 --device cpu --no-tensorboard --output-dir {out} --save {out} --use-distributed-optimizer"
        )
        return [*base.split(), *(word for text in more for word in text.split())]

    return make


@pytest.mark.parametrize(
    ("module", "words", "command"),
    [
        ("yaml", "pyyaml", "launch"),
        ("psutil", "psutil", "launch"),
        ("torch", "torch", "launch"),
        ("megatron", "megatron-core", "train"),
    ],
)
def test_a_package_that_is_not_there_is_named(module, words, command):
    """Before any check of packages can run: the parser, the checks and the model need packages themselves."""
    code = f"import sys; sys.modules[{module!r}] = None; from megatron_vlm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, command, "--load", "x", "--data_path", "y", "--device", "cpu"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and f"the package {words} is not installed: pip install " in said, said
    assert "Traceback" not in said


def test_no_command_repeats_what_libraries_say_at_every_start(tmp_path):
    """megatron-core's list of optional packages; a warning of anybody else is still told."""
    code = (
        "import sys, warnings; from megatron_vlm.cli.main import main; code = main(sys.argv[1:]); "
        "import megatron.core.optimizer.optimizer, megatron.core.models.backends; warnings.warn('mine'); sys.exit(code)"
    )
    argv = [
        sys.executable,
        "-c",
        code,
        "convert",
        "mg2hf",
        "--load",
        str(tmp_path / "no"),
        "--out",
        str(tmp_path / "out"),
    ]
    names = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=names)
    assert done.returncode == 1 and "mine" in done.stderr
    assert [line for line in done.stderr.splitlines() if "Warning" in line and "mine" not in line] == []


def start(argv: list[str], log: Path, world: int = 2) -> list[commands.Command]:
    """Starts ``megatron-vlm train`` as ranks of one job, each in a session of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        commands.start(["train", *argv], Path(f"{log}.{rank}"), RANK=rank, LOCAL_RANK=rank, **place)
        for rank in range(world)
    ]


def finish(ranks: list[commands.Command], timeout: float = 180) -> list[int]:
    """Waits for all ranks and returns their exit codes; kills what is left at the deadline."""
    deadline = time.monotonic() + timeout
    try:
        return [rank.wait(max(0.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def wait_for_lines(path: Path, lines: int, ranks: list[commands.Command], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), "the run ended early"
        time.sleep(0.01)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("rank*.safetensors"))}


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(run_argv, tmp_path):
    """kill -9 of both ranks in mid-run; then one rank alone dies and the other notices; then the run ends."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = "--train-iters 14 --save-interval 3 --keep-last 2"
    assert finish(start(run_argv(whole, more), tmp_path / "whole.log")) == [0, 0]

    ranks = start(run_argv(cut, more), tmp_path / "cut.log")
    wait_for_lines(cut / "metrics.jsonl", 4, ranks)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
    assert finish(ranks) == [-signal.SIGKILL] * 2

    resume = run_argv(cut, more, f"--load {cut}")
    ranks = start(resume, tmp_path / "cut.log")
    wait_for_lines(cut / "metrics.jsonl", 7, ranks)
    os.killpg(ranks[1].pid, signal.SIGKILL)
    assert finish(ranks, timeout=60) == [1, -signal.SIGKILL]

    assert finish(start(resume, tmp_path / "cut.log")) == [0, 0]
    assert metrics_of(cut) == metrics_of(whole)
    assert [line["iteration"] for line in metrics_of(cut)] == list(range(1, 15))
    assert files_of(cut / "iter_0000014") == files_of(whole / "iter_0000014") != {}


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_all_end_with_143(run_argv, tmp_path):
    out = tmp_path / "out"
    ranks = start(run_argv(out, "--train-iters 100000 --save-interval 2 --async-save"), tmp_path / "log")
    wait_for_lines(out / "metrics.jsonl", 2, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    assert finish(ranks) == [143, 143]
    last = metrics_of(out)[-1]["iteration"]
    assert (out / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_once_and_ends_all(run_argv, tmp_path):
    argv = run_argv(tmp_path / "out", "--train-iters 2 --load /no/such/model")
    assert finish(start(argv, tmp_path / "log"), timeout=60) == [1, 1]
    told = [Path(f"{tmp_path / 'log'}.{rank}").read_text() for rank in range(2)]
    assert [text.count("error: /no/such/model") for text in told] == [1, 0]
    assert all("Traceback" not in text for text in told)


def test_config_errors_leave_one_line(capsys):
    assert main(["train", "--lerning-rate", "1"]) == 1
    out = capsys.readouterr().err
    assert out.startswith("error: unknown flag --lerning-rate") and out.count("\n") == 1


def test_unknown_command_names_the_nearest(capsys):
    assert main(["tarin"]) == 1
    assert "did you mean 'train'" in capsys.readouterr().err


def test_a_command_of_another_program_names_the_one_that_does_it(capsys):
    others = {"sft": "launch", "pth_to_hf": "convert pth_to_hf", "merge_lora": "convert merge", "infer": "generate"}
    for word, command in others.items():
        assert main([word]) == 1
        assert f"unknown command {word!r}: `megatron-vlm {command}` does that" in capsys.readouterr().err
    for words in MEANT.values():
        assert not set(words.split()) & set(COMMANDS)
    assert len(" ".join(MEANT.values()).split()) == len(set(" ".join(MEANT.values()).split()))


def test_help_and_version(capsys):
    assert main(["--help"]) == 0 and main(["train", "--help"]) == 0 and main(["--version"]) == 0
    assert main([]) == 1
    assert "--micro-batch-size" in capsys.readouterr().out


def test_a_reader_that_leaves_gets_no_traceback():
    command = [sys.executable, "-m", "megatron_vlm", "launch", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) != 0
