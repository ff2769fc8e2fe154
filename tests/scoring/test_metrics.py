"""Metrics against by-hand values and the examples that their sources publish."""

import numpy as np
import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.scoring.metrics import METRICS, Score, bootstrap, check_metrics, summary, wilson


def value(name, answer, *references):
    return METRICS[name](answer, references)[0]


def test_exact_match():
    assert value("exact_match", " Two  Dogs. ", "cats", "two dogs") == 1.0
    assert value("exact_match", "2.5", "25") == 0.0 and value("exact_match", "dogs", "dog") == 0.0


def test_anls():
    """rapidfuzz's documented example: lewenstein and levenshtein are 2 edits of 11 characters apart, 0.818...; below 0.5 is 0."""
    assert value("anls", "Lewenstein", "levenshtein") == pytest.approx(1 - 2 / 11)
    assert value("anls", "kitten", "sitting", "KITTEN ") == 1.0
    assert value("anls", "kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert value("anls", "abcd", "abxy") == 0.5 and value("anls", "abcd", "axyz") == 0.0


def test_relaxed_accuracy():
    """ChartQA: 5 % of the reference, its ends included; percent are hundredths; texts exactly."""
    for answer, reference, right in [
        ("95", "100", 1.0), ("94.9", "100", 0.0), ("104%", "1", 1.0), ("5%", "0.05", 1.0), ("-2", "2", 0.0),
        ("0", "0", 1.0), ("0.0", "0", 0.0), ("Red", "red", 1.0), ("reds", "red", 0.0), ("nan", "nan", 1.0), ("inf", "3", 0.0),
    ]:  # fmt: skip
        assert value("relaxed_accuracy", answer, reference) == right, (answer, reference)


def test_character_error_rate():
    """Levenshtein's kitten and sitting: 3 edits. Of several answers: all edits by all characters, as jiwer's ``cer``."""
    assert METRICS["cer"]("kitten", ["sitting"]) == (pytest.approx(3 / 7), 7.0)
    assert value("cer", "", "abc") == 1.0 and value("cer", "abcdef", "ab") == 2.0
    assert METRICS["cer"]("ab", ["zzzzzzzz", "abc"]) == (pytest.approx(1 / 3), 3.0)
    pairs = [("this is tst", "this is a test"), ("hello", "hello")]
    score = summary([METRICS["cer"](answer, [text]) for answer, text in pairs])
    assert score.value == pytest.approx(3 / (14 + 5)) and score.low <= score.value <= score.high and score.number == 2


def test_wilson_as_published():
    """The interval of 81 of 263 (Newcombe 1998, Statistics in Medicine 17, table I, method 3): 0.2553 to 0.3662."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_intervals_fit_what_is_scored():
    hits = summary([(1.0, 1.0)] * 81 + [(0.0, 1.0)] * 182)
    assert (hits.low, hits.high) == wilson(81, 263) and hits.value == pytest.approx(81 / 263)
    draws = np.random.default_rng(1).uniform(size=400)
    low, high = bootstrap(draws, np.ones(400))
    half = 1.96 * draws.std() / 20  # of the mean, by the normal distribution
    assert (low, high) == pytest.approx((draws.mean() - half, draws.mean() + half), abs=half / 5)
    assert str(Score(value=0.5, low=0.25, high=1.0, number=3)) == "0.5000 [0.2500, 1.0000]"


def test_metrics_that_are_none():
    with pytest.raises(ConfigError, match=r"unknown metric 'exact' \(did you mean 'exact_match'\?\)"):
        check_metrics(["exact"])
    with pytest.raises(ConfigError, match="no metric is named"):
        check_metrics([])
