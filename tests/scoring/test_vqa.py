"""The challenge's own rules, word by word."""

import pytest

from megatron_vlm.scoring.vqa import accuracy, normalised


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("The Two dogs.", "2 dogs"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("red/blue", "red blue"),
        ("red / blue", "red  blue".replace("  ", " ")),
        ("what's\tthat?", "what 's that"),
        ("An a the", ""),
    ],
)
def test_answers_are_made_alike(answer, compared):
    assert normalised(answer) == compared


def test_three_of_ten_people_are_enough():
    """100 % where at least 3 others gave the answer; leaving each person out gives 0.9, 0.6 and 0.3 below that."""
    people = ["yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["never"]
    assert accuracy("Yes.", people) == 1.0
    assert accuracy("no", people) == pytest.approx((3 * 2 / 3 + 7 * 1.0) / 10)  # 0.9
    assert accuracy("maybe", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)  # 0.6
    assert accuracy("never", people) == pytest.approx(9 * 1 / 3 / 10)  # 0.3
    assert accuracy("blue", people) == 0.0
    assert accuracy("a cat", ["Cat"]) == 1.0 and accuracy("dog", ["cat", "cat"]) == 0.0
