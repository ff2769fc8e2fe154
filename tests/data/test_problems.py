"""What is said of records that cannot be used, and of those that are."""

import json

from megatron_vlm.data.problems import SHOWN, Notes, Problem, describe, rejected_line
from megatron_vlm.errors import Reason

PROBLEM = Problem(source=0, record=3, file="a.json", message="no picture b.png", reason=Reason.MISSING_IMAGE.number)


def test_a_problem_names_its_place():
    assert str(PROBLEM) == "a.json, record 3: no picture b.png"
    cut = Problem(source=0, record=-1, file="a.tar", message="cut short", key="x7")
    assert str(cut) == "a.tar, sample x7: cut short"
    line = {"file": "a.json", "record": 3, "reason": "no picture b.png", "kind": "missing image"}
    assert json.loads(rejected_line(PROBLEM)) == line
    assert json.loads(rejected_line(cut))["key"] == "x7"


def test_many_problems_are_counted_and_some_shown():
    text = describe([PROBLEM] * (SHOWN + 2), 1000, False)
    assert text.startswith("52 problems in 1000 records:\n  a.json, record 3: no picture b.png\n")
    assert text.count("no picture") == SHOWN and "and 2 more" in text
    assert f"      52  {Reason.MISSING_IMAGE.words}" in text and "--on-bad-sample skip" in text


def test_advice_fits_the_fault():
    assert "5.2% of the records cannot be used, and 1.0% may be left out" in describe(
        [PROBLEM] * 52, 1000, False, allowed=0.01
    )
    assert "what follows a fault like this cannot be read" in describe([PROBLEM], 9, True)
    assert "start from another folder than --image-root" in describe([PROBLEM] * 9, 9, False)
    assert "the cause above" in describe([PROBLEM] * 9, 9, False, hint="the folder is /b")


def test_notes_are_told_once_a_place_with_counts():
    notes = Notes()
    notes.add("a.json", Reason.UNKNOWN_KEYS, ["lang", "id2"])
    notes.add("a.json", Reason.UNKNOWN_KEYS, ["lang"], 4)
    notes.add("b.json", Reason.UNKNOWN_KEYS, [f"k{i}" for i in range(23)])
    first, second = notes.lines()
    assert "keys that are not known and not read: lang (5), id2 (1)" in first and "a.json" in first
    assert "and 3 more" in second and "b.json" in second
