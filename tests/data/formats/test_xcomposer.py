"""InternLM-XComposer2's format: placeholders, the list file and its counts, missing placeholders."""

import json

import pytest

from megatron_vlm.errors import DataError
from tests.data.formats.make import built, records_of, write_json, write_pictures

TALK = [{"from": "User", "value": "<ImageHere> and <ImageHere>?"}, {"from": "ASSISTANT", "value": "Two."}]
BARE = [{"from": "human", "value": "What?"}, {"from": "assistant", "value": "A cat."}]


def test_placeholders_and_roles(tmp_path):
    path = write_json(tmp_path / "a.json", [{"id": "1", "image": ["0.png", "1.png"], "conversations": TALK}])
    (record,) = records_of("xcomposer", path)
    assert [t.role for t in record.turns] == ["user", "assistant"]
    assert record.turns[0].text == "<image> and <image>?" and record.images == ("0.png", "1.png")


def test_images_without_a_placeholder_are_refused_unless_prepended(tmp_path):
    path = write_json(tmp_path / "a.json", [{"image": ["0.png", "1.png"], "conversations": BARE}])
    (found,) = records_of("xcomposer", path)
    assert isinstance(found, DataError) and "--missing-placeholder prepend" in str(found)
    (record,) = records_of("xcomposer", path, prepend=True)
    assert record.turns[0].text == "<image><image>What?"
    # Some placeholders, but not enough, are a mistake in any case.
    path = write_json(tmp_path / "b.json", [{"image": ["0.png"], "conversations": TALK}])
    (found,) = records_of("xcomposer", path, prepend=True)
    assert "2 <image> placeholders for 1 images" in str(found)


def test_the_other_placeholder_is_named(tmp_path):
    talk = [{"from": "human", "value": "<image>?"}, {"from": "assistant", "value": "x"}]
    (found,) = records_of("xcomposer", write_json(tmp_path / "a.json", [{"image": "a", "conversations": talk}]))
    assert "the placeholder of this format is <ImageHere>" in str(found)


def test_list_file_gives_counts_per_epoch(tmp_path):
    """Three sources, of which one is larger than its share and two are smaller; the counts are exact."""
    write_pictures(tmp_path, 2)
    names = ("one.json", "a name with spaces.json", "sub/three.jsonl")
    for number, name in zip((3, 5, 4), names):
        records = [{"id": i, "image": ["0.png", "1.png"], "conversations": TALK} for i in range(number)]
        write_json(tmp_path / name, records)
    (tmp_path / "data.txt").write_text(
        "# sources\n\none.json 0.002\n  a name with spaces.json   0.0123\n\tsub/three.jsonl\t1.5\n"
    )
    manifest, samples = built(tmp_path / "out", "xcomposer", tmp_path / "data.txt", root=str(tmp_path))
    assert [(s["name"], s["first_sample"], s["samples"], s["repeat"], s["per_epoch"]) for s in manifest["sources"]] == [
        ("one.json", 0, 3, None, 2),
        ("a name with spaces.json", 3, 5, None, 12),
        ("three.jsonl", 8, 4, None, 1500),
    ]
    assert len(samples) == 12 and samples[3].key == "a-name-with-spaces-000000000"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "names no file"),
        ("# nothing\n", "names no file"),
        ("one.json\n", "line 1: expected PATH K"),
        ("one.json 1\none.json x\n", "line 2: expected PATH K"),
        ("one.json 0\n", "K must be at least 0.001"),
        ("one.json nan\n", "K must be at least 0.001"),
        ("one.json -1\n", "K must be at least 0.001"),
        ("no.json 1\n", "line 1: no.json is neither in"),
        (b"\xff 1", "not UTF-8"),
    ],
)
def test_bad_lists_are_named(tmp_path, text, message):
    write_json(tmp_path / "one.json", [])
    (tmp_path / "data.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        records_of("xcomposer", tmp_path / "data.txt")
    assert "data.txt" in str(caught.value)


def test_repeat_contradicts_a_list(tmp_path):
    (tmp_path / "data.txt").write_text("one.json 1")
    with pytest.raises(DataError, match="--repeat"):
        records_of("xcomposer", tmp_path / "data.txt", repeat=[2])
