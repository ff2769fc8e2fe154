"""Which checkpoint is the best, and that a run which goes on, or went back, still knows."""

from megatron_vlm.files import read_json
from megatron_vlm.training.checkpoint.best import Best


def test_the_best_of_those_that_are_there(tmp_path):
    best = Best(tmp_path, "loss", 0, True)
    assert best.folder is None
    for iteration, loss in enumerate((3.0, 1.0, 1.0, float("nan"), 0.5), 1):
        best.saving(iteration, loss)
        if iteration != 5:  # the disk refused it
            (tmp_path / f"iter_000000{iteration}").mkdir()
    assert best.folder == tmp_path / "iter_0000002"
    assert read_json(tmp_path / "best.json")["best"] == 5
    (tmp_path / "iter_0000002").rmdir()
    assert best.folder == tmp_path / "iter_0000003"
    again = Best(tmp_path, "loss", 1, False)  # it went on from iteration 1
    assert again.folder == tmp_path / "iter_0000001"
    again.saving(2, 0.1)
    assert read_json(tmp_path / "best.json")["best"] == 5  # rank 0 writes
    assert Best(tmp_path, "anls", 9, False).folder is None


def test_higher_is_better_but_for_errors(tmp_path):
    for metric, wanted in (("anls", 2), ("cer", 1)):
        best = Best(tmp_path, metric, 0, False)
        for iteration, value in ((1, 0.25), (2, 0.75)):
            (tmp_path / f"iter_000000{iteration}").mkdir(exist_ok=True)
            best.saving(iteration, value)
        assert best.folder == tmp_path / f"iter_000000{wanted}", metric
