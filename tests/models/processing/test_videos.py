"""Numbers in words against num2words; frames against transformers' video processors: in the tests of the families."""

from num2words import num2words

from megatron_vlm.models.processing.videos import in_words


def test_numbers_are_written_as_num2words_writes_them():
    for number in (*range(0, 1200), *range(1990, 70_000, 37), 100_000, 100_001, 999_999):
        assert in_words(number) == num2words(number)
