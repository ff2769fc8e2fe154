"""How good an answer is, by the measures of public benchmarks; and of many answers, with how sure that is.

answer, references --METRICS[name]--> (value, weight) ... --summary--> Score: weighted mean and its 95 % interval
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.scoring import vqa

Value = tuple[float, float]
"""Of one answer: value, and its weight in the mean."""

_Z = 1.959963984540054  # of a normal distribution, 95 % lie within
_RESAMPLES = 2000
_ANLS_LEAST = 0.5
_TOLERANCE = 0.05


def exact_match(answer: str, references: Sequence[str]) -> Value:
    """1 where a reference is the answer, letter case, blanks and a full stop at the end aside."""
    return float(_plain(answer) in map(_plain, references)), 1.0


def vqa_accuracy(answer: str, references: Sequence[str]) -> Value:
    """The VQA challenge's; see ``vqa.accuracy``."""
    return vqa.accuracy(answer, references), 1.0


def anls(answer: str, references: Sequence[str]) -> Value:
    """Average normalised Levenshtein similarity (Biten et al. 2019): 1 - distance / longer length, below 0.5 nothing."""
    best = max(Levenshtein.normalized_similarity(_joined(answer), _joined(text)) for text in references)
    return (best if best >= _ANLS_LEAST else 0.0), 1.0


def relaxed_accuracy(answer: str, references: Sequence[str]) -> Value:
    """ChartQA's (Masry et al. 2022): numbers may be off by 5 % of the reference, texts are equal but for letter case."""
    return float(any(_relaxed(answer.strip(), text.strip()) for text in references)), 1.0


def character_error_rate(answer: str, references: Sequence[str]) -> Value:
    """Edits (characters put in, left out, changed) by characters of the nearest reference; 0 is best, above 1 is possible.

    Of many answers: all edits by all characters.
    """
    answer = " ".join(answer.split())
    texts = [" ".join(text.split()) for text in references]
    return min((Levenshtein.distance(answer, text) / len(text), float(len(text))) for text in texts)


METRICS: dict[str, Callable[[str, Sequence[str]], Value]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "cer": character_error_rate,
}
LOWER_IS_BETTER = ("cer",)


def check_metrics(names: Sequence[str]) -> None:
    """Raises ConfigError unless all are metrics, and there is one."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"unknown metric {name!r}{nearest(name, METRICS)}")
    if not names:
        raise ConfigError(f"no metric is named: choose of {', '.join(METRICS)}")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over answers.

    Attributes:
        value: the mean.
        low, high: ends of its 95 % interval.
        number: of answers.
    """

    value: float
    low: float
    high: float
    number: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def summary(values: Sequence[Value]) -> Score:
    """The weighted mean; its interval is Wilson's where every value is 0 or 1 and counts alike, else bootstrap percentiles.

    Args:
        values: at least one.
    """
    value, weight = np.array(values, dtype=np.float64).T
    mean = float((value * weight).sum() / weight.sum())
    if set(value) <= {0.0, 1.0} and set(weight) == {1.0}:
        low, high = wilson(int(value.sum()), len(value))
    else:
        low, high = bootstrap(value, weight)
    return Score(value=mean, low=low, high=high, number=len(value))


def wilson(hits: int, number: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share: sound for few answers and for shares near 0 and 1."""
    share, spread = hits / number, _Z * _Z / number
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / number / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(value: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Percentiles of the mean over answers drawn anew (Efron 1979), always the same draws; float64 [N] each."""
    draws, means = np.random.default_rng(0), []
    for _ in range(_RESAMPLES):
        chosen = draws.integers(0, len(value), len(value))
        means.append(float((value[chosen] * weight[chosen]).sum() / weight[chosen].sum()))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _joined(text: str) -> str:
    return " ".join(text.lower().split())


def _plain(text: str) -> str:
    return _joined(text).removesuffix(".").rstrip()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _relaxed(answer: str, reference: str) -> bool:
    found, wanted = _number(answer), _number(reference)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= _TOLERANCE
    return answer.lower() == reference.lower()
