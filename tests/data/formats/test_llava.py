"""LLaVA's format: what is read, and what is refused by file and record number."""

import json

import pytest

from megatron_vlm.data.formats import guess_records, open_sources, read_source
from megatron_vlm.data.formats.records import RecordSource
from megatron_vlm.errors import DataError


def turns(*values, first="human"):
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


GOOD = {"id": 7, "image": "a.png", "conversations": turns("<image>\nWhat?", "A cat.")}


def read(tmp_path, text, name="data.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (source,) = open_sources("llava", [path])
    records = [found for _, _, found in read_source(source)]
    for found in records:
        if isinstance(found, DataError):
            raise found
    return records


@pytest.mark.parametrize("name, join", [("data.json", ",\n"), ("data.jsonl", "\n"), ("data.JSONL", "\r\n\n")])
def test_json_and_jsonl(tmp_path, name, join):
    other = {"conversations": [{"from": "System", "value": "Be brief."}, *turns("Hi", "Hello ☕")]}
    two = {"id": "x", "image": ["b/1.jpg", "/abs/2.jpg"], "conversations": turns("<image><image>", "ok", "more", "yes")}
    text = join.join(json.dumps(r, ensure_ascii=False) for r in (GOOD, other, two))
    records = read(tmp_path, f"[{text}]" if name == "data.json" else text, name)
    assert [r.number for r in records] == [0, 1, 2]
    assert [r.label for r in records] == ["7", "", "x"]
    assert [r.images for r in records] == [("a.png",), (), ("b/1.jpg", "/abs/2.jpg")]
    assert [t.role for t in records[1].turns] == ["system", "user", "assistant"]
    assert records[1].turns[2].text == "Hello ☕"


def test_roles_in_any_letter_case(tmp_path):
    talk = [{"from": "HUMAN", "value": "a"}, {"from": " Gpt", "value": "b"}, {"from": "User", "value": "c"}]
    talk += [{"from": "Assistant", "value": "d"}]
    assert [t.role for t in read(tmp_path, json.dumps([{"conversations": talk}]))[0].turns] == ["user", "assistant"] * 2


def with_turns(*values, **rest):
    return {"conversations": turns(*values), **rest}


@pytest.mark.parametrize(
    "record, message",
    [
        ([], "a record is a json object"),
        ({}, "'conversations' must be"),
        ({"conversations": []}, "'conversations' must be"),
        ({"conversations": [{"from": "human"}]}, "texts 'from' and 'value'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "texts 'from' and 'value'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
        (with_turns("q"), "has no answer"),
        (with_turns("q", "a", "q"), "has no answer"),
        ({"conversations": turns("a", "q", first="gpt")}, "roles out of order"),
        ({"conversations": turns("q")[:1] * 2}, "roles out of order"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "no user turn"),
        ({"conversations": [*turns("q", "a"), {"from": "system", "value": "x"}]}, "roles out of order"),
        (with_turns("q", ""), "empty answer in turn 1"),
        (with_turns("q", "a", "q", " \n"), "empty answer in turn 3"),
        (with_turns("q", "a", image="x.png"), "0 <image> placeholders for 1 images"),
        (with_turns("<image>", "a"), "1 <image> placeholders for 0 images"),
        (with_turns("<image><image>", "a", image=["x.png"]), "2 <image> placeholders for 1 images"),
        (with_turns("<image>", "a", image=3), "'image' must be"),
        (with_turns("<image>", "a", image=[None]), "'image' must be"),
        (with_turns("<image>", "a", image=""), "1 <image> placeholders for 0 images"),
        (with_turns("<image>", "a", image=[""]), "'image' must be"),
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_bad_records_are_named(tmp_path, record, message, name):
    lines = [json.dumps(r) for r in (GOOD, GOOD, record)]
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, "\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]", name)
    assert name in str(caught.value) and "record 2" in str(caught.value)


LINE = json.dumps(GOOD)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"expected '\[' .*line 1 column 1"),
        ("{}", r"expected '\[' .*line 1 column 1"),
        (f"[{LINE}\n,\n  {{'a'}}]", "record 1.*line 3 column 4"),
        (f"[{LINE},]", "expected a record"),
        (f"[{LINE}\n{LINE}]", r"expected ',' or '\]' at line 2 column 1"),
        (f"[{LINE}", "expected ',' or"),
        (f"[{LINE}] x", "expected the end of the file at line 1"),
        ('[{"a": NaN}]', "NaN"),
        ('[{"a": 1, "a": 2}]', "duplicate key 'a'"),
        ("[" + '{"a":' * 100_000, "nested too deeply"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        ('[{"a": "' + "x" * 5_000_000 + '"}]', "the limit is"),
    ],
)
def test_bad_json_gives_line_and_column(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, text)
    assert "data.json" in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (f"{LINE}\n{{\n{LINE}", "record 1.*line 2 column"),
        (f"{LINE}\n{LINE} {{}}", "text after the json value, line 2"),
        (f"{LINE}\n".encode() + b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_jsonl_gives_line_and_column(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text, "data.jsonl")


def test_byte_order_mark_is_skipped(tmp_path):
    for name, text in (("a.json", f"[{LINE}]"), ("a.jsonl", LINE)):
        assert len(read(tmp_path, b"\xef\xbb\xbf" + text.encode(), name)) == 1


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"no\.json.*No such file"):
        list(read_source(open_sources("llava", [tmp_path / "no.json"])[0]))


def test_the_number_of_records_is_guessed_without_parsing(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_vlm.data.formats.CHUNK", 7)  # marks lie across chunks
    record = {"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps([record] * 5, indent=1))
    (tmp_path / "b.jsonl").write_text("\n".join([json.dumps(record)] * 3))
    (tmp_path / "c.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    (tmp_path / "d.jsonl").write_text("")
    sources = open_sources("llava", [tmp_path / name for name in ("a.json", "b.jsonl", "c.jsonl", "d.jsonl")])
    assert [guess_records([source]) for source in sources] == [5, 3, 2, 0] and guess_records(sources) == 10
    assert guess_records([RecordSource(path=str(tmp_path / "a.json"), format="parquet")]) is None
