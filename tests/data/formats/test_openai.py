"""OpenAI's format: text and parts, images by path and data URI, system messages, and what is refused."""

import base64

import pytest

from megatron_vlm.errors import DataError
from tests.data.formats.make import built, picture, records_of, write_json, write_pictures


def messages(*items):
    return {"messages": [{"role": role, "content": content} for role, content in items]}


def uri(data, head="data:image/png;base64,"):
    return head + base64.b64encode(data).decode()


def url(value):
    return {"type": "image_url", "image_url": {"url": value}}


def text(value):
    return {"type": "text", "text": value}


def test_text_and_parts(tmp_path):
    write_pictures(tmp_path, 2)
    path = write_json(
        tmp_path / "a.jsonl",
        [
            messages(("System", "Be brief."), ("USER", "Hi"), ("assistant", "Hello")),
            messages(
                ("developer", "Look."),
                ("user", [text("First "), url("0.png"), text(" then "), url({"no": 1} and uri(picture(3)))]),
                ("assistant", [text("Seen.")]),
            ),
            messages(("user", [{"type": "image", "image": "1.png"}, text("?")]), ("assistant", "Green.")),
            {**messages(("user", [{"type": "image"}, text("?")]), ("assistant", "Red.")), "images": ["0.png"]},
            messages(("user", [{"type": "image", "path": "0.png"}, text("?")]), ("assistant", "Red.")),
            messages(("user", [{"type": "image", "url": uri(picture(3))}, text("?")]), ("assistant", "Navy.")),
            messages(
                ("user", [{"type": "image", "base64": base64.b64encode(picture(3)).decode()}]), ("assistant", "N")
            ),
            {
                **messages(("user", "<image>"), ("assistant", "N")),
                "image": {"bytes": base64.b64encode(picture(3)).decode()},
            },
            {**messages(("user", [url("file://" + str(tmp_path / "1.png"))]), ("assistant", "x")), "id": "last"},
        ],
    )
    _, samples = built(tmp_path / "out", "openai", path, root=str(tmp_path))
    assert [[t.role for t in s.turns] for s in samples[:2]] == [["system", "user", "assistant"]] * 2
    assert samples[1].turns[1].text == "First <image> then <image>" and samples[1].turns[2].text == "Seen."
    assert samples[1].images == (picture(0), picture(3)) and samples[1].image_names == ("0.png", "#1")
    assert [s.images for s in samples[2:]] == [(picture(i),) for i in (1, 0, 0, 3, 3, 3, 1)]
    assert samples[2].turns[0].text == "<image>?"


@pytest.mark.parametrize(
    "record, message",
    [
        ({}, "'messages' must be"),
        ({"messages": [3]}, r"messages\[0\] must be an object"),
        (messages(("user", "q"), ("tool", "x")), r"messages\[1\]: unknown role 'tool'"),
        (messages(("user", "q"), ("assistant", None)), "'content' must be a text or a list of parts, this is NoneType"),
        (messages(("user", "q"), ("assistant", [{"type": "audio"}])), r"content\[0\]: unknown type 'audio'"),
        (messages(("user", [{"type": "text"}]), ("assistant", "a")), "'text' must be a text"),
        (messages(("user", [url(None)]), ("assistant", "a")), "'image_url' must be a path or a data URI"),
        (messages(("user", [url("http://a.b/c.png")]), ("assistant", "a")), "only files are read"),
        (
            messages(("user", [{"type": "image", "url": "https://a.b/c.png"}]), ("assistant", "a")),
            "only files are read; dow",
        ),
        (
            messages(("user", [{"type": "image", "url": "a", "path": "b"}]), ("assistant", "a")),
            "under path and url: keep",
        ),
        ({**messages(("user", "<image>"), ("assistant", "a")), "image": {"bytes": "!"}}, "'bytes' is not base64"),
        (messages(("user", [url("data:image/png,xx")]), ("assistant", "a")), "must read data:image"),
        (messages(("user", [url("data:image/png;base64,!!")]), ("assistant", "a")), "not base64"),
        (messages(("user", [url("data:image/png;base64,")]), ("assistant", "a")), "holds nothing"),
        ({**messages(("user", [url("a")]), ("assistant", "a")), "images": ["b"]}, "and beside them"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [1]}]}, "calls of tools"),
        (messages(("user", "a"), ("user", "b"), ("assistant", "c")), "roles out of order"),
        (messages(("user", "<image>"), ("assistant", "c")), "1 <image> placeholders for 0 images"),
    ],
)
def test_refused_by_name(tmp_path, record, message):
    (found,) = records_of("openai", write_json(tmp_path / "a.jsonl", [record]))
    assert isinstance(found, DataError) and found.key == "record 0"
    with pytest.raises(DataError, match=message):
        raise found
