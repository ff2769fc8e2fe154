"""Which checkpoint is the best, that a run which goes on, or went back, still knows, and that it is there."""

from megatron_vlm.files import read_json, write_json
from megatron_vlm.training.checkpoint.best import Best
from megatron_vlm.weights import remote
from megatron_vlm.weights.checkpoint_dir import BEST, folder_name
from tests.weights.checkpoint_folders import make


def test_the_best_of_those_that_are_there(tmp_path):
    best = Best(tmp_path, "loss", 0)
    assert best.record()["best"] is None
    for iteration, loss in enumerate((3.0, 1.0, 1.0, float("nan"), 0.5), 1):
        best.saving(iteration, loss)
        # A save that has only begun is not named: it may never be there.
        assert read_json(tmp_path / BEST)["best"] == (None, 1, 2, 2, 2)[iteration - 1]
        if iteration != 5:  # the disk refused it
            write_json(tmp_path / BEST, best.record(iteration))
            (tmp_path / folder_name(iteration)).mkdir()
            best.saved(iteration)
            assert read_json(tmp_path / BEST)["best"] == (1, 2, 2, 2)[iteration - 1]
    (tmp_path / "iter_0000002").rmdir()
    assert best.record()["best"] == 3
    again = Best(tmp_path, "loss", 1)  # it went on from iteration 1
    assert again.record() == {"metric": "loss", "best": 1, "scores": {1: 3.0}}
    assert Best(tmp_path, "anls", 9).record()["best"] is None


def test_higher_is_better_but_for_errors(tmp_path):
    for metric, wanted in (("anls", 2), ("cer", 1)):
        best = Best(tmp_path, metric, 0)
        for iteration, value in ((1, 0.25), (2, 0.75)):
            (tmp_path / folder_name(iteration)).mkdir(exist_ok=True)
            best.saving(iteration, value)
        assert best.record()["best"] == wanted, metric


def test_in_a_store_it_stays_and_another_host_knows_it(tmp_path):
    url, here = f"file://{tmp_path / 'store'}", tmp_path / "here"
    here.mkdir()
    best = Best(here, "loss", 0, url)
    for iteration, loss in enumerate((2.0, 1.0, 3.0, 4.0, 5.0), 1):
        best.saving(iteration, loss)
        record = best.record(iteration)
        write_json(here / BEST, record)
        remote.upload(make(here, iteration), url, 2, record["best"], [BEST])
        best.saved(iteration)
    assert remote.iterations(url) == [2, 4, 5]
    elsewhere = Best(tmp_path / "there", "loss", 4, url)
    assert elsewhere.record() == {"metric": "loss", "best": 2, "scores": {1: 2.0, 2: 1.0, 3: 3.0, 4: 4.0}}
