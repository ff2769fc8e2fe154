"""The schedule against megatron-core's own, and the settings that cannot work."""

from types import SimpleNamespace

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.optimizer.build import set_learning_rates
from megatron_vlm.training.optimizer.config import OptimizerConfig, Schedule


class Groups:
    """As much of an optimizer as a scheduler sees."""

    def __init__(self, groups):
        self.param_groups = groups


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("start", [0.0, 2e-5])
def test_schedule_equals_megatron_core(style, warmup, start):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = OptimizerConfig(
        lr=1e-3, min_lr=1e-5, lr_decay_style=style, lr_warmup_iters=warmup, lr_warmup_init=start, lr_decay_iters=40
    )
    schedule = Schedule.of(config, 60)
    reference = OptimizerParamScheduler(
        Groups([]), start, 1e-3, 1e-5, warmup, 40, style, 0.0, 0.0, 1, "constant", False, False
    )
    for step in range(60):
        reference.num_steps = step
        assert schedule.lr(step) == pytest.approx(reference.get_lr({"max_lr": 1e-3, "min_lr": 1e-5}), rel=1e-12), step


def test_fraction_and_start_factor_are_relative():
    config = OptimizerConfig(lr=1e-3, lr_warmup_fraction=0.25, lr_warmup_start_factor=0.1)
    schedule = Schedule.of(config, 40)
    assert schedule.warmup_iters == 10
    assert schedule.lr(0) == pytest.approx(1e-4)
    assert schedule.lr(5) == pytest.approx(5.5e-4)
    assert schedule.lr(10) == pytest.approx(1e-3)
    assert schedule.lr(40) == pytest.approx(0)


def test_fraction_is_rounded_as_in_transformers():
    """Up, float error included: 0.29 of 100 are 29 updates, and 0.07 of 100 are 8."""
    from transformers import TrainingArguments

    for ratio in [*(i / 100 for i in range(100)), 1 / 3, 0.015, 0.999, 1e-9]:
        for total in (1, 2, 3, 7, 10, 33, 99, 100, 101, 700, 1000, 5198, 12345, 10**7 + 1):
            wanted = TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=ratio), total)  # type: ignore[arg-type]
            schedule = Schedule.of(OptimizerConfig(lr_warmup_fraction=ratio), total)
            assert schedule.warmup_iters == wanted, (ratio, total)
            assert all(0 <= schedule.lr(step) < 1.0001e-4 for step in (0, 1, total - 1, total))
    sizes = [Schedule.of(OptimizerConfig(lr_warmup_fraction=f), 100).warmup_iters for f in (0.29, 0.07, 0.0)]
    assert sizes == [29, 8, 0]


def test_groups_follow_one_curve():
    schedule = Schedule.of(OptimizerConfig(lr=1e-3, vision_lr=1e-4, connector_lr=2e-3, lr_decay_style="linear"), 10)
    assert schedule.at(5) == pytest.approx({"llm": 5e-4, "vision": 5e-5, "connector": 1e-3})


def test_rates_reach_the_parameter_groups():
    optimizer = Groups([{"group": "vision", "wd_mult": 0.0}, {"group": "llm", "wd_mult": 1.0}])
    set_learning_rates(optimizer, {"llm": 1.0, "vision": 0.5, "connector": 0.25}, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.0), (1.0, 0.1)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": 0}, "lr"),
        ({"vision_lr": -1.0}, "vision_lr"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "min_lr"),
        ({"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, "lr_warmup_fraction"),
        ({"lr_warmup_fraction": 1.5}, "lr_warmup_fraction"),
        ({"lr_warmup_init": 1e-5, "lr_warmup_start_factor": 0.1}, "lr_warmup_start_factor"),
        ({"lr_warmup_start_factor": 2.0}, "warm-up"),
        ({"adam_beta1": 1.0}, "betas"),
        ({"clip_grad": -1}, "clip_grad"),
    ],
)
def test_settings_that_cannot_work(settings, named):
    with pytest.raises(ConfigError, match=named):
        OptimizerConfig(**settings)


def test_warmup_longer_than_the_run():
    with pytest.raises(ConfigError, match="warm-up of 10 iterations leaves none of 10"):
        Schedule.of(OptimizerConfig(lr_warmup_iters=10), 10)
