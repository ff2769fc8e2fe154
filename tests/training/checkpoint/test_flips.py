"""A flipped bit in a training checkpoint, its tracker or a data folder is found by every reader, or nothing read changes."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.digests import SEAL
from megatron_vlm.errors import MegatronVLMError
from megatron_vlm.files import read_json
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.fuzz import flip_bit, run_forked
from megatron_vlm.weights.checkpoint_dir import TRACKER, candidates, verify
from tests.training.checkpoint.ranks import two_saves

FEW, ALL = 40, 200
NEWEST = "iter_0000002"


@pytest.fixture(scope="module")
def saved(twins, tmp_path_factory) -> Path:
    """A folder with iterations 1 and 2 of two ranks."""
    root = tmp_path_factory.mktemp("saved")
    run_distributed(two_saves, twins("mistral"), str(root), {"tensor_model_parallel_size": 2}, {}, tp=2)
    return root


def values_of(file: Path) -> object:
    """What a JSON file says, but for the name of a digest, which nobody misses."""
    try:
        values = json.loads(file.read_bytes())
    except ValueError:
        return None
    known = ("format", "iteration", "layout", "optimizer", "sequence", "versions", "files", SEAL)
    if file.name != "manifest.json" or SEAL in values:
        return values
    return {key: value for key, value in values.items() if key in known}


@pytest.mark.parametrize("flips", [FEW, pytest.param(ALL, marks=pytest.mark.full)])
def test_every_flip_in_a_checkpoint_is_found(saved, tmp_path, flips):
    rng, missed, found, copy = random.Random(flips), [], 0, tmp_path / "copy"
    shutil.copytree(saved, copy)
    names = [path.relative_to(saved) for path in sorted((saved / NEWEST).rglob("*")) if path.is_file()]
    for number in range(flips):  # every file is as likely as another, else weights take all
        name = Path(TRACKER) if number % 10 == 0 else rng.choice(names)
        what = flip_bit(copy / name, rng)
        first = candidates(copy)
        try:
            verify(copy / NEWEST)
            read_json(copy / NEWEST / "state.json")
            if name == Path(TRACKER):  # believed nowhere: the same is taken
                assert first is not None and first.folders[0].name == NEWEST
            elif name.suffix != ".json" or values_of(copy / name) not in (
                values_of(saved / name),
                sealed_values(saved / name),
            ):
                missed.append((str(name), what))
        except MegatronVLMError as error:
            assert name.name in str(error), (name, what, error)
            found += 1
        shutil.copy(saved / name, copy / name)
    assert missed == [] and found >= 0.8 * flips


def sealed_values(file: Path) -> object:
    """Of a manifest: the same without its digest."""
    values = json.loads(file.read_bytes())
    return {key: value for key, value in values.items() if key != SEAL}


def test_every_command_finds_it(saved, train_data, tmp_path):
    """``train --load`` goes on at the one before, or fails where the damaged one is named; the others fail."""
    bad = tmp_path / "bad"
    shutil.copytree(saved, bad)
    flip_bit(bad / NEWEST / "rank1.safetensors", random.Random(2))
    data = f"--data-path {train_data} --seq-length 96 --micro-batch-size 2 --global-batch-size 2 --lr 1e-3 --shortest-edge 24"
    run = f"{data} --num-workers 0 --device cpu --no-tensorboard --train-iters 3 --output-dir {tmp_path / 'run'}"
    commands = {
        "train": f"train --load {bad} --ckpt-step 2 {run}",
        "generate": f"generate --load {bad} --prompt Hi --max-new-tokens 1 --device cpu",
        "mg2hf": f"convert mg2hf --load {bad} --out {tmp_path / 'hf'}",
        "hf2mg": f"convert hf2mg --hf {bad} --out {tmp_path / 'mg'}",
    }
    for command, text in commands.items():
        outcome = run_forked(lambda text=text: main(text.split()), tmp_path / "log", seconds=60)
        assert outcome.code == 1 and "rank1.safetensors was changed: its sha256" in outcome.output, (command, outcome)
        assert "Traceback" not in outcome.output, (command, outcome)
    assert not (tmp_path / "hf").exists() and not (tmp_path / "mg").exists()


def contents(folder: Path) -> list[tuple]:
    """Everything that training reads of a data folder."""
    dataset = Dataset([folder])
    try:
        samples = [dataset.read(number) for number in range(len(dataset))]
    finally:
        dataset.close()
    return [(sample.key, sample.turns, tuple(sample.images), sample.options) for sample in samples]


@pytest.mark.parametrize("flips", [FEW, pytest.param(ALL, marks=pytest.mark.full)])
def test_every_flip_in_a_data_folder_is_found(train_data, tmp_path, flips):
    """By its error, or the samples are the same: a header's date, the filling between two files."""
    good, rng, missed, found, copy = contents(train_data), random.Random(flips), [], 0, tmp_path / "copy"
    shutil.copytree(train_data, copy)
    names = [path.relative_to(copy) for path in sorted(copy.rglob("*")) if path.is_file()]
    for _ in range(flips):
        name = rng.choice(names)
        what = flip_bit(copy / name, rng)
        try:
            if contents(copy) != good:
                missed.append((str(name), what))
        except MegatronVLMError as error:
            assert str(copy) in str(error), (name, what, error)
            found += 1
        shutil.copy(train_data / name, copy / name)
    assert missed == [] and found > 0
