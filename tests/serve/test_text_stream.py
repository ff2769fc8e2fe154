"""Text appears as soon as it is certain, and is never taken back."""

from megatron_vlm.serve.text_stream import TextStream


def shown(pieces: list[bytes], *stop_words: str) -> tuple[list[str], TextStream]:
    """What is shown token by token, of tokens that stand for bytes."""
    stream = TextStream(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace").strip(), stop_words)
    parts = []
    for token in range(len(pieces)):
        parts.append(stream.add(token))
        if stream.stopped:
            break
    return [*parts, stream.rest()], stream


def test_halves_of_a_character_wait_for_the_rest():
    assert shown([b" a", b"\xe4\xbd", b"\xa0 ", b"b"])[0] == ["a", "", "\u4f60", " b", ""]
    assert shown([b"a", b"\xe4"])[0] == ["a", "", "\ufffd"]  # it never came


def test_a_stop_word_ends_the_answer_and_is_no_part_of_it():
    parts, stream = shown([b"a </", b"i> b </", b"end", b"> c"], "</end>")
    assert parts == ["a ", "</i> b ", "", "", ""] and stream.stopped and stream.text == "a </i> b"
    parts, stream = shown([b"one\n", b"two", b" three"], "###", "two")
    assert "".join(parts) == stream.text == "one" and stream.stopped
    parts, stream = shown([b"a #", b"#"], "###")
    assert parts == ["a ", "", "##"] and not stream.stopped
