"""Damage, full disks and kills: what loads is the newest whole checkpoint, or an error on every rank."""

import shutil

import pytest

from megatron_vlm.errors import CheckpointError
from megatron_vlm.testing.distributed import forkserver, run_distributed
from megatron_vlm.training.optimizer.state import MOMENTS
from megatron_vlm.weights import checkpoint_dir
from megatron_vlm.weights.rank_files import RankFiles
from tests.training.checkpoint.ranks import full_disk, killed_save, looked_for, same_bits, two_saves

TP2 = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def saved(twins, tmp_path_factory):
    """A folder with iterations 1 and 2 of two ranks."""
    root = tmp_path_factory.mktemp("saved")
    run_distributed(two_saves, twins("mistral"), str(root), TP2, {}, tp=2)
    return root


def flip(path, place=-1000):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


NEWEST = "iter_0000002"
DAMAGES = {
    "a bit of weights": (lambda root: flip(root / NEWEST / "rank1.safetensors"), "rank1.safetensors was changed"),
    "a bit of a header": (lambda root: flip(root / NEWEST / "rank0.safetensors", 500), "rank0.safetensors was changed"),
    "a byte cut off": (lambda root: cut(root / NEWEST / "rank0.safetensors"), "manifest.json says"),
    "a rank's file missing": (lambda root: (root / NEWEST / "rank1.safetensors").unlink(), "is missing"),
    "the manifest cut": (lambda root: cut_in_half(root / NEWEST / "manifest.json"), "manifest.json is not valid JSON"),
    "the manifest missing": (lambda root: (root / NEWEST / "manifest.json").unlink(), "it has no manifest.json"),
    "another state": (lambda root: flip(root / NEWEST / "state.json", 14), "state.json was changed"),
    "another config": (lambda root: flip(root / NEWEST / "hf" / "config.json", 5), "config.json was changed"),
    "the folder missing": (lambda root: shutil.rmtree(root / NEWEST), "it has no manifest.json"),
}


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damage_is_noticed_and_passed_over_unless_named(saved, tmp_path):
    cases, configs = list(DAMAGES.items()), []
    for number, (_, (damage, _)) in enumerate(cases):
        root = tmp_path / str(number)
        shutil.copytree(saved, root)
        damage(root)
        configs += [{"load": str(root)}, {"load": str(root), "ckpt_step": 2}, {"load": str(root / NEWEST)}]
    first, second = run_distributed(looked_for, configs, tp=2)
    assert first == second  # one verdict
    for number, (name, (_, message)) in enumerate(cases):
        fallback, named, folder = first[3 * number : 3 * number + 3]
        assert fallback == ("iter_0000001", False), name
        if name == "the folder missing":
            assert "has no iter_0000002 (--ckpt-step); iterations there: 1" in named
            assert folder == "none"
        else:
            assert message in named and message in folder, name


def test_where_nothing_is_left_or_nothing_was(saved, tmp_path):
    both, empty = tmp_path / "both", tmp_path / "empty"
    shutil.copytree(saved, both)
    for folder in both.glob("iter_*"):
        flip(folder / "rank0.safetensors")
    empty.mkdir()
    configs = [
        {"load": str(both)},
        {"load": str(both), "verify_hashes": False},
        {"load": str(empty)},
        {"load": str(tmp_path / "absent")},
        {"load": str(empty), "ckpt_step": 3},
    ]
    answers = run_distributed(looked_for, configs, dp=2)
    assert answers[0] == answers[1]
    all_damaged, sizes_only, nothing, absent, named = answers[0]
    assert "iter_0000001" in all_damaged and "iter_0000002" in all_damaged
    assert sizes_only == (NEWEST, False)
    assert nothing == absent == "none"
    assert "has no iter_0000003 (--ckpt-step); iterations there: none" in named


def test_full_disk_fails_on_every_rank_and_training_goes_on(twins, tmp_path):
    for message, left, after, loss in run_distributed(full_disk, twins("mistral"), str(tmp_path), TP2, tp=2):
        assert "rank1.safetensors failed" in message
        assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]
        assert after == ["iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"]
        assert loss > 0


def run_killed(hf_dir, save, killed_at, world, store):
    context = forkserver()
    ranks = [
        context.Process(target=killed_save, args=(hf_dir, str(save), killed_at, rank, str(store), world))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in ranks]


def loaded(save):
    """(iteration, every stored tensor and step) of the first candidate that is whole."""
    for folder in checkpoint_dir.candidates(save).folders:
        try:
            checkpoint_dir.verify(folder)
        except CheckpointError:
            continue
        with RankFiles(folder) as files:
            tensors = {(k, name): files.read(name, k) for k in ("model", *MOMENTS) for name in files.names(k)}
            return checkpoint_dir.iteration_of(folder), {**tensors, "steps": files.steps}
    raise AssertionError(f"nothing whole in {save}")


def same_contents(a, b):
    return a.keys() == b.keys() and all(a[key] == b[key] if key == "steps" else same_bits(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_kill_at_every_step_of_a_save_leaves_the_previous_or_the_new_one(twins, tmp_path):
    hf_dir, root, whole = twins("mistral"), tmp_path / "before", tmp_path / "whole"
    run_distributed(two_saves, hf_dir, str(root), {}, {})
    shutil.copytree(root, whole)
    assert run_killed(hf_dir, whole, 10**9, 1, tmp_path / "store") == [0]
    expected = {2: loaded(root)[1], 3: loaded(whole)[1]}
    assert not same_contents(expected[2], expected[3])
    seen = []
    for call in range(100):
        save = tmp_path / f"killed{call}"
        shutil.copytree(root, save)
        (code,) = run_killed(hf_dir, save, call, 1, tmp_path / f"store{call}")
        assert code == (-9 if code else 0)
        iteration, found = loaded(save)
        assert same_contents(found, expected[iteration]), f"a mix after a kill at call {call}"
        seen.append(iteration)
        if code == 0:
            break
    print(f"{len(seen) - 1} places to die at, the new one loads from {seen.index(3)} on")
    assert code == 0 and len(seen) > 15
    assert seen == sorted(seen) and set(seen) == {2, 3}


@pytest.mark.slow
def test_a_killed_rank_leaves_the_previous_one(twins, tmp_path):
    hf_dir, save = twins("mistral"), tmp_path / "save"
    run_distributed(two_saves, hf_dir, str(save), {}, {}, dp=2)
    codes = run_killed(hf_dir, save, 0, 2, tmp_path / "store")
    assert codes[1] == -9 and codes[0] not in (0, None)
    assert loaded(save)[0] == 2
    assert sorted(path.name for path in save.iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]
