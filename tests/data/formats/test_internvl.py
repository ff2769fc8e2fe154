"""InternVL's format: meta.json and its keys, per-sample options, video among the records."""

import json

import pytest

from megatron_vlm.data.formats.records import VideoSettings
from megatron_vlm.data.sample import Video
from megatron_vlm.errors import DataError
from tests.data.formats.make import built, picture, records_of, write_json, write_pictures

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
PLAIN = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
GOOD = {"root": "pics", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 1, "length": 3}


def test_meta_file(tmp_path):
    write_pictures(tmp_path / "pics", 3)
    write_pictures(tmp_path / "pics" / "clip", 5)
    write_pictures(tmp_path / "other", 1)
    two = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "Two."}]
    film = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "Colours."}]
    write_json(
        tmp_path / "a.jsonl",
        [
            {"id": 0, "image": "0.png", "width": 20, "height": 12, "conversations": TALK},
            {"id": 1, "image": ["1.png", "2.png"], "conversations": two},
            {"id": 2, "video": "clip", "conversations": film},
            {"id": 3, "conversations": PLAIN},
        ],
    )
    write_json(tmp_path / "b.jsonl", [{"image": "0.png", "conversations": TALK}])
    meta = {
        "first": {**GOOD, "repeat_time": 0.5, "max_dynamic_patch": 6},
        "second": {**GOOD, "root": str(tmp_path / "other"), "annotation": "b.jsonl", "data_augment": True,
                   "repeat_time": 3},
    }  # fmt: skip
    write_json(tmp_path / "meta.json", meta)
    manifest, samples = built(
        tmp_path / "out", "internvl", tmp_path / "meta.json", root=str(tmp_path), video=VideoSettings(max_frames=3)
    )
    assert [(s["name"], s["samples"], s["repeat"]) for s in manifest["sources"]] == [
        ("first", 4, 0.5),
        ("second", 1, 3),
    ]
    assert [s.options for s in samples] == [{"max_dynamic_patch": 6}] * 4 + [{"data_augment": True}]
    assert samples[1].images == (picture(1), picture(2))
    assert samples[2].turns[0].text == "<video>\nWhat happens?"
    assert samples[2].turns[0].videos == (Video(frames=(0, 1, 2), total=3, fps=24.0),)
    assert samples[2].images == (picture(0), picture(2), picture(4))
    assert samples[2].image_names == ("clip/0.png", "clip/2.png", "clip/4.png")
    assert samples[3].turns[0].role == "system" and samples[3].images == ()
    assert samples[4].images == (picture(0),)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"root": None}, "'root' is missing"),
        ({"annotation": None}, "'annotation' is missing"),
        ({"data_augment": None}, "'data_augment' is missing"),
        ({"repeat_time": None}, "'repeat_time' is missing"),
        ({"repeat_tiem": 1}, "unknown key 'repeat_tiem' .*did you mean 'repeat_time'"),
        ({"repeat_time": 0}, "'repeat_time' must be a number above 0, this is 0"),
        ({"repeat_time": "2"}, "'repeat_time' must be a number"),
        ({"repeat_time": True}, "'repeat_time' must be a number"),
        ({"data_augment": "yes"}, "'data_augment' must be true or false"),
        ({"max_dynamic_patch": 0}, "'max_dynamic_patch' must be a whole number, at least 1"),
        ({"length": -1}, "'length' must be a whole number"),
        ({"annotation": "a.json"}, "'annotation' must be a .jsonl file"),
        ({"annotation": "no.jsonl"}, "annotation no.jsonl is neither in"),
    ],
)
def test_wrong_and_missing_keys_are_named(tmp_path, change, message):
    write_json(tmp_path / "a.jsonl", [])
    entry = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    write_json(tmp_path / "meta.json", {"mine": entry})
    with pytest.raises(DataError, match=message) as caught:
        records_of("internvl", tmp_path / "meta.json")
    assert "data set 'mine'" in str(caught.value) and "meta.json" in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "an object of data sets"),
        ("[]", "an object of data sets"),
        ('{"a": 3}', "must be an object, this is int"),
        ('{"a": {},\n "a": {}}', "duplicate key 'a'"),
        ('{"a": {}\n "b": {}}', "line 2 column 2"),
        ('{"a": {}} x', "text after the json value, line 1 column 11"),
    ],
)
def test_bad_meta_files_are_named(tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DataError, match=message):
        records_of("internvl", tmp_path / "meta.json")


def test_a_jsonl_is_read_alone(tmp_path):
    path = write_json(tmp_path / "a.jsonl", [{"image": "x.png", "conversations": TALK}])
    assert records_of("internvl", path)[0].images == ("x.png",)
    bare = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    path = write_json(tmp_path / "b.jsonl", [{"image": "x.png", "conversations": bare}])
    assert records_of("internvl", path, prepend=True)[0].turns[0].text == "<image>\nWhat?"
    assert "placeholders" in str(records_of("internvl", path)[0])
    assert json.loads(path.read_text())["image"] == "x.png"
