"""What is due after an iteration."""

from types import SimpleNamespace

from megatron_vlm.training.due import Due


def due(
    iteration, consumed, *, valid=("v",), interval=None, save="s", save_interval=None, save_epochs=None, **training
):
    lengths = {
        "train_iters": None,
        "train_samples": None,
        "train_epochs": None,
        "eval_interval": None,
        "eval_epochs": None,
    }
    config = SimpleNamespace(
        data=SimpleNamespace(valid=valid),
        evaluate=SimpleNamespace(interval=interval),
        checkpoint=SimpleNamespace(
            save=save, save_interval=save_interval, save_epochs=save_epochs, keep_best=training.pop("keep_best", None)
        ),
        training=SimpleNamespace(**lengths | training),
    )
    return Due(config=config, iteration=iteration, consumed=consumed, samples_per_epoch=10)


def test_a_run_ends_with_its_iterations_samples_or_epochs():
    assert due(5, (16, 20), train_iters=5).finished and not due(4, (90, 99), train_iters=5).finished
    assert due(5, (16, 20), train_samples=20).finished and not due(5, (16, 19), train_samples=20).finished
    assert due(5, (16, 25), train_epochs=2.5).finished and not due(5, (16, 24), train_epochs=2.5).finished


def test_intervals_and_the_end():
    assert due(4, (0, 4), train_iters=9, eval_interval=4).evaluation
    assert not due(5, (0, 4), train_iters=9, eval_interval=4).evaluation
    assert due(9, (0, 4), train_iters=9).evaluation and not due(9, (0, 4), valid=(), train_iters=9).evaluation
    assert due(6, (0, 4), train_iters=9, interval=3).answers and due(9, (0, 4), train_iters=9, interval=4).answers
    assert (
        due(8, (0, 4), train_iters=9, eval_interval=4).answers and not due(8, (0, 4), train_iters=9, interval=3).answers
    )
    assert due(6, (0, 4), train_iters=9, save_interval=3).save and due(9, (0, 4), train_iters=9, save_interval=4).save
    assert not due(9, (0, 4), train_iters=9, save=None).save


def test_a_step_that_passes_an_epoch():
    assert (
        due(3, (8, 12), train_epochs=9, save_epochs=1.0).save and due(3, (8, 10), train_epochs=9, save_epochs=1.0).save
    )
    assert not due(3, (10, 14), train_epochs=9, save_epochs=1.0).save
    assert due(3, (4, 5), train_epochs=9, eval_epochs=0.5).evaluation


def test_what_decides_which_checkpoint_is_best_is_known_when_one_is_saved():
    saved = dict(train_iters=9, save_interval=2)
    assert (
        due(4, (0, 4), keep_best="loss", **saved).evaluation and not due(4, (0, 4), keep_best="loss", **saved).answers
    )
    assert (
        due(4, (0, 4), keep_best="anls", **saved).answers and not due(4, (0, 4), keep_best="anls", **saved).evaluation
    )
    assert not due(5, (0, 4), keep_best="loss", **saved).evaluation and not due(4, (0, 4), **saved).evaluation
