"""Steps are read while the next is at work, in order, and before anything that must know."""

from types import SimpleNamespace

import pytest

from megatron_vlm.errors import TrainingError
from megatron_vlm.training.metrics.reports import StepReports, Unread


class Step:
    """A step at work: ``events`` says when its result was asked for."""

    def __init__(self, number, events, bad=False):
        self.number, self.events, self.bad, self.arrived = number, events, bad, True

    def result(self):
        self.events.append(f"read {self.number}")
        if self.bad:
            raise TrainingError("loss nan is not finite")
        return self.number


def reports(events, late):
    facts = SimpleNamespace(of_step=lambda result, seconds, ids: {"ids": ids, "s": seconds})
    written = SimpleNamespace(
        step=lambda *args, **facts: events.append((args[0], args[1], facts["ids"], facts["consumed_samples"]))
    )
    return StepReports(facts, written, 9, 1, dict, late=late)


def run(found, events, numbers, bad=None):
    for number in numbers:
        found.begin()
        events.append(f"start {number}")
        found.add(Unread(Step(number, events, number == bad), number, {"llm": 1.0}, 10 * number, [number]))


def test_a_step_is_read_when_the_next_has_started():
    events = []
    found = reports(events, late=True)
    run(found, events, (1, 2))
    assert events == ["start 1", "start 2", "read 1", (1, 1, [1], 10)]
    found.flush()
    found.flush()
    assert events[4:] == ["read 2", (2, 2, [2], 20)]


def test_on_the_host_at_once():
    events = []
    run(reports(events, late=False), events, (1, 2))
    assert events == ["start 1", "read 1", (1, 1, [1], 10), "start 2", "read 2", (2, 2, [2], 20)]


def test_a_step_that_is_not_finite_ends_the_run_before_a_save():
    events = []
    found = reports(events, late=True)
    run(found, events, (1,), bad=1)
    with pytest.raises(TrainingError):
        found.flush()  # as Trainer.save does first
    found.flush()  # said once
    assert events == ["start 1", "read 1"]


def test_what_is_there_when_a_run_fails_is_reported_and_nothing_waited_for(caplog):
    events = []
    found = reports(events, late=True)
    run(found, events, [1, 2])
    found.give_up()
    found.give_up()
    assert events[-2:] == ["read 2", (2, 2, [2], 20)]
    run(found, events, [3], bad=3)
    found.give_up()  # the error that ends the run goes on; what the step says stands beside it
    assert events[-1] == "read 3" and "loss nan is not finite" in caplog.text
    run(found, events, [4])
    found._unread.step.arrived = False
    found.give_up()
    assert events[-1] == "start 4"
