"""Json read in chunks: the same as in one piece, and every fault with its place."""

import json

import pytest

from megatron_vlm.data.formats import json_file
from megatron_vlm.data.formats.json_file import read_json, read_json_records
from megatron_vlm.errors import DataError

VALUES = [{"text": "ü" * 40, "n": 12345}, [], {"deep": [{"a": None}]}, "text", -1.5e3, {"x": "}],["}]


@pytest.mark.parametrize("chunk", [3, 4, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_chunks_of_any_size_give_the_same_records(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_file, "CHUNK", chunk)
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text("\ufeff \n" + json.dumps(VALUES, indent=indent, ensure_ascii=False) + "\n")
    lines.write_text("\n\n".join(json.dumps(value, ensure_ascii=False) for value in VALUES))
    assert list(read_json_records(array)) == list(read_json_records(lines)) == list(enumerate(VALUES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', "Expecting ':' delimiter, line 2 column 7"),
        ('[{"a": 1},\n]', "expected a record at line 2 column 1"),
        ('[{"a": 1} {"a": 2}]', "expected ',' or ']' at line 1 column 11"),
        ("[1] x", "expected the end of the file at line 1 column 5"),
        ('{"a": 1}', "name a file of one record a line .jsonl"),
        ('[{"a": 1, "a": 2}]', "duplicate key 'a'"),
        ("[NaN]", "NaN is not a number in json"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2", "expected ',' or ']'"),
    ],
)
def test_a_bad_array_ends_with_its_place(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_json_records(path))
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_bad_line_stands_in_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a" 2}\n"' + b"x" * 60 + b'"\n\xff\n{"a": 3} 4\n{"a": 5}')
    found = list(read_json_records(path, max_bytes=50))
    assert [number for number, _ in found] == [0, 1, 2, 3, 4, 5]
    assert found[0][1] == {"a": 1} and found[5][1] == {"a": 5}
    wanted = ["line 2 column 6", "more than 50 bytes, the limit, line 3", "line 4 byte 1", "line 5 column 10"]
    assert all(text in str(value) for text, (_, value) in zip(wanted, found[1:5]))


def test_a_record_beyond_the_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([1, "x" * 100]))
    with pytest.raises(DataError, match="the record has 102 characters, the limit is 50"):
        list(read_json_records(path, max_bytes=50))


def test_one_value(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff {"a": [1]} \n')
    assert read_json(path) == {"a": [1]}
    path.write_text('{"a": 1}\n x')
    with pytest.raises(DataError, match="text after the json value, line 2 column 2"):
        read_json(path)
    with pytest.raises(DataError, match="more than 5 bytes, the limit"):
        read_json(path, max_bytes=5)
    with pytest.raises(DataError, match=r"b\.json: No such file"):
        read_json(tmp_path / "b.json")
