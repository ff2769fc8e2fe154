"""Errors: their reasons, and that they travel."""

import pickle

from megatron_vlm.errors import ConfigError, DataError, Reason, nearest


def test_reasons_are_told_by_number_and_never_renumbered():
    """Counts files keep numbers: what versions before this one wrote must be read as it was meant."""
    old = ("", "too_long", "nothing_supervised", "placeholders", "max_image_num", "control_tokens", "unreadable",
           "image_too_small", "too_many_patches")  # fmt: skip
    assert tuple(Reason.numbered(number).text for number in range(9)) == old
    numbers = [reason.number for reason in Reason]
    assert sorted(numbers) == list(range(len(numbers))) and len({reason.text for reason in Reason}) == len(numbers)
    assert [r for r in Reason if not r] == [Reason.NONE] and not Reason.NONE.of_the_processor
    assert Reason.TOO_LONG.of_the_processor and not Reason.PLACEHOLDERS.of_the_processor


def test_an_error_keeps_its_reason_wherever_it_goes():
    error = DataError("3 tokens", reason=Reason.TOO_LONG, key="k", shard="s.tar", offset=3)
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.reason, back.key, back.shard, back.offset) == (str(error), Reason.TOO_LONG, "k", "s.tar", 3)
    moved = error.at(key="other")
    assert (str(moved), moved.reason, moved.shard) == ("sample other: 3 tokens", Reason.TOO_LONG, None)
    assert DataError("x").reason is Reason.BAD_RECORD and Reason.TOO_LONG is pickle.loads(pickle.dumps(Reason.TOO_LONG))


def test_any_message_can_be_printed():
    for error in (DataError("name \ud800.png", key="\udcff"), ConfigError("name \udcff")):
        str(error).encode("utf-8")
    assert "\\ud800" in str(DataError("name \ud800.png")) and "\\udcff" in str(DataError("x", key="\udcff"))


def test_the_nearest_name_or_a_list_that_can_be_read():
    assert nearest("trian", ["train", "chat"]) == " (did you mean 'train'?)"
    assert nearest("zzz", ["train", "chat"]) == " (known: chat, train)"
    assert nearest("zzz", [f"name_{i}" for i in range(60)]) == ""
