"""What the ranks tell of an answer, in one process and in two: the same text as transformers', piece by piece."""

import threading

import pytest

from megatron_vlm.serve.config import ServeConfig
from megatron_vlm.serve.ranks import serve
from megatron_vlm.testing.distributed import run_distributed
from tests.serve.oracle import NEW, hf_answer


def events_of(config, requests, stop_after=None):
    """On a rank: all that it emits; ``stop_after`` so many texts it is asked to stop, on rank 1 if there is one."""
    import torch.distributed as dist

    stop, found = threading.Event(), []

    def emit(event):
        found.append(event)
        if sum("text" in e for e in found) == stop_after and dist.get_rank() == dist.get_world_size() - 1:
            stop.set()

    serve(ServeConfig.from_dict(config), iter(requests), emit, stop)
    return found


def ask(model, *turns, images=()):
    return {"model": model, "turns": list(turns), "images": [str(i) for i in images], "videos": []}


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.full), 2])
def test_answers_equal_transformers_and_come_in_turns(twins, picture, tp):
    config = {
        "models": [{"load": str(twin)} for twin in twins],
        "tp": tp,
        "device": "cpu",
        "sampling": {"max_new_tokens": NEW},
    }
    first = ("user", "<image>\nWhat digit is this?")
    both = {"number": 0, "asks": [ask(model, first, images=[picture]) for model in (0, 1)]}
    second = [first, ("assistant", "five"), ("user", "And now?")]
    again = {"number": 1, "asks": [ask(1, *second, images=[picture])]}
    lost = {"number": 2, "asks": [ask(0, ("user", "<image>"), images=["none.png"])]}
    long = {"number": 3, "asks": [ask(0, ("user", "cats " * 1100))]}
    odd = [("system", "<image>"), first, ("assistant", "an <image> of a <video>"), ("user", "Why?")]
    marked = {"number": 4, "asks": [ask(0, *odd, images=[picture])]}
    half, name = ({"number": 5, "asks": [ask(0, ("user", text))]} for text in ("a\ud800", "\ufdd09\ufdd1"))
    for events in run_distributed(events_of, config, [both, again, lost, long, marked, half, name], tp=tp):
        assert events[0] == {"ready": [str(twin) for twin in twins]}
        ends = [i for i, event in enumerate(events) if "end" in event]
        one, two, three, four, five, six, seven = (events[a + 1 : b] for a, b in zip([0, *ends], ends))
        for model, twin in enumerate(twins):
            mine = [event for event in one if event["model"] == model]
            text, done = "".join(event.get("text", "") for event in mine), mine[-1]["done"]
            assert text == done["text"] == hf_answer(twin, [first], picture)
            assert done["why"] == "length" and done["tokens"] == NEW
        assert len({event["model"] for event in one[:4]}) == 2  # neither waits for the other
        assert two[-1]["done"]["text"] == hf_answer(twins[1], second, picture)
        assert len(three) == len(four) == 1
        assert "cannot read image none.png" in three[0]["error"] and "/reset starts anew" in four[0]["error"]
        assert five[-1]["done"]["tokens"] == NEW
        assert "half a character" in six[0]["error"] and "U+FDD0" in seven[0]["error"]


def test_an_answer_stops_where_any_rank_is_told(twins):
    """On both ranks after the same token, and the next question is answered in full."""
    config = {"models": [{"load": str(twins[0])}], "tp": 2, "device": "cpu", "sampling": {"max_new_tokens": 30}}
    request = {"number": 0, "asks": [ask(0, ("user", "How many cats?"))]}
    left, right = run_distributed(events_of, config, [request], stop_after=3, tp=2)
    for events in (left, right):
        assert events[-2]["done"]["why"] == "stopped"
        assert "".join(event.get("text", "") for event in events) == events[-2]["done"]["text"]
    assert left[-2]["done"]["tokens"] == right[-2]["done"]["tokens"] < 30
