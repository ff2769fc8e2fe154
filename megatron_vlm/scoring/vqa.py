"""Answers as the VQA and TextVQA challenges compare them: case, punctuation, articles, number words, apostrophes made alike.

Source of the rules: ``EvalAIAnswerProcessor`` and ``TextVQAAccuracyEvaluator`` of github.com/facebookresearch/mmf
(``mmf/utils/m4c_evaluators.py``), after ``vqaEval.py`` of github.com/GT-Vision-Lab/VQA (Antol et al. 2015).
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # commas and question marks go before
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _WORDS.split() for mark in re.finditer("'", word)
}
"""Each word with one of its apostrophes left out -> the word."""


def normalised(answer: str) -> str:
    """Returns an answer as it is compared."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = before = text.replace("\n", " ").replace("\t", " ")
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in before or f" {mark}" in before else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def accuracy(answer: str, references: Sequence[str]) -> float:
    """How well people agree with an answer: the mean, over all but one of them, of min(1, those who gave it / 3).

    With fewer than four references, which the rule is not made for: 1 where one of them is the answer, else 0.
    """
    found, said = normalised(answer), [normalised(reference) for reference in references]
    if len(said) < 4:
        return float(found in said)
    same = [text == found for text in said]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)
