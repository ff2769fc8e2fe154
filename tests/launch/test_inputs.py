"""Raw data: told apart by content, built once, built anew when it changes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.errors import ConfigError
from megatron_vlm.launch.build_inputs import build_data, check_data
from megatron_vlm.launch.checks import Report
from megatron_vlm.launch.inputs import open_inputs, tell_format
from megatron_vlm.options.launch_config import LaunchConfig
from tests.data.formats.make import write_tar
from tests.launch.conftest import write_records

CONFIG = DataConfig(seq_length=96, shortest_edge=24, num_workers=0)
HERE = {"root": "", "annotation": "train.jsonl", "data_augment": False, "repeat_time": 1}


@pytest.fixture(scope="module")
def processor(model):
    return registry.get("idefics2").processor(model, CONFIG)


def opened(tmp_path: Path, *inputs: object, **launch: object):
    settings = LaunchConfig(shard_cache=str(tmp_path / "cache"), **launch)
    return open_inputs("train", [str(path) for path in inputs], settings, "llava")


def test_formats_are_told_by_name_and_content(tmp_path):
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    marked = [{"from": "user", "value": "<ImageHere>hello"}, {"from": "assistant", "value": "hi"}]
    files = {
        "llava.json": json.dumps([{"conversations": turns}]),
        "llava.jsonl": json.dumps({"conversations": turns}) + "\n",
        "xcomposer.json": json.dumps([{"conversations": turns}, {"image": ["a.png"], "conversations": marked}]),
        "openai.jsonl": json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n",
        "internvl.json": json.dumps({"name": HERE}),
        "xcomposer.txt": "llava.json 0.01\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert tell_format(str(tmp_path / name), "llava") == Path(name).stem
    assert tell_format(str(tmp_path / "llava.json"), "xcomposer") == "xcomposer"  # its own records have no mark
    (tmp_path / "other.json").write_text('[{"text": "hello"}]')
    for name in ("other.json", "data.csv", ""):
        with pytest.raises(ConfigError, match="--data_format"):
            tell_format(str(tmp_path / name), "llava")


def test_shards_are_built_once_and_again_when_something_changes(tmp_path, processor):
    path = write_records(tmp_path / "data", 10)

    def start(**launch):
        report, inputs = Report(), opened(tmp_path, path, **launch)
        build_data(report, inputs, CONFIG, processor, tmp_path / "cache")
        assert not report.failed, report.failed
        return inputs.shards, report.findings[0].text, (inputs.shards / "manifest.json").stat().st_mtime_ns

    shards, text, made = start()
    assert "shards built in" in text
    assert start()[2] == made and "shards of an earlier start" in start()[1]
    assert start(image_root=str(tmp_path / "data"))[0] == shards  # the same folder, said aloud

    Image.new("RGB", (50, 60), "red").save(tmp_path / "data" / "red.png")  # a picture behind the same name
    again = start()
    assert again[0] == shards and "shards built in" in again[1] and again[2] != made

    records = json.loads(path.read_text())
    records[3]["conversations"][1]["value"] = "gold"
    path.write_text(json.dumps(records))
    assert start()[0] != shards
    assert start(missing_placeholder="prepend")[0] not in (shards, start()[0])


def test_lists_and_meta_files(tmp_path):
    path = write_records(tmp_path / "data", 10)
    listing = tmp_path / "data" / "data.txt"
    listing.write_text("train.json 0.02\n")
    (source,) = opened(tmp_path, listing, data_format="xcomposer").sources
    assert (source.per_epoch, source.repeat, source.prepend) == (20, None, True)
    (source,) = opened(tmp_path, listing, given_num=False).sources
    assert (source.per_epoch, source.repeat) == (None, 0.02)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in json.loads(path.read_text())))
    meta = tmp_path / "data" / "meta.json"
    meta.write_text(json.dumps({"colours": {**HERE, "repeat_time": 3}}))
    inputs = opened(tmp_path, meta)
    (source,) = inputs.sources
    assert (source.title, source.repeat, source.prepend) == ("colours", 3, True)
    assert len(inputs.images) == 5 and all(size > 0 for _, size, _ in inputs.images)  # found beside the file


def test_folders_of_shards_are_checked_once(tmp_path, processor):
    path = write_records(tmp_path / "data", 10)
    inputs = opened(tmp_path, path)
    build_data(Report(), inputs, CONFIG, processor, tmp_path / "cache")
    ready = opened(tmp_path, inputs.shards)
    assert ready.folders == (str(inputs.shards),) and not ready.sources
    report = Report()
    check_data(report, ready, CONFIG, processor, tmp_path / "cache")
    assert "10 sound records" in report.findings[0].text
    again = Report()
    check_data(again, ready, CONFIG, processor, tmp_path / "cache")
    assert [finding.text.split(":")[0] for finding in again.findings] == ["train"]  # the survey alone

    damaged = next(inputs.shards.glob("*.tar"))
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    report = Report()
    check_data(report, ready, CONFIG, processor, tmp_path / "other")
    assert "damaged" in report.failed[0].text


def test_records_left_out_by_a_policy_are_no_failure(tmp_path, processor):
    path = write_records(tmp_path / "data", 10)
    records = json.loads(path.read_text())
    records[4]["conversations"][1]["value"] = "red " * 200
    path.write_text(json.dumps(records))
    for policy, failures in (("raise", 1), ("drop", 0)):
        report, config = Report(), CONFIG.replace(on_too_long=policy)
        check_data(report, opened(tmp_path, path), config, processor, tmp_path / "cache")
        assert len(report.failed) == failures and "too_long" in report.findings[0].text, report.findings
    records[5]["image"] = "nowhere.png"
    path.write_text(json.dumps(records))
    report, config = Report(), CONFIG.replace(on_too_long="drop", on_bad_sample="skip", max_bad_fraction=0.1)
    build_data(report, opened(tmp_path, path), config, processor, tmp_path / "cache")
    assert not report.failed and "8 samples" in report.findings[-1].text, report.findings


@pytest.mark.parametrize("look", [check_data, build_data])
def test_records_that_cannot_be_used_are_told_and_bounded(tmp_path, processor, look):
    """One of 200 is left out, with its reason and the list of all; four of 200 stop the start; all of them say why."""
    config = CONFIG.replace(on_bad_sample="skip")

    def start(bad, **changes):
        path = write_records(tmp_path / "data", 200)
        records = json.loads(path.read_text())
        for record in records[:bad]:
            record["image"] = f"nowhere/{record['id']}.png"
        path.write_text(json.dumps(records))
        report, inputs = Report(), opened(tmp_path, path)
        look(report, inputs, config.replace(**changes), processor, tmp_path / "cache")
        return report, inputs

    for _ in range(2):  # the second finds shards of the first
        report, inputs = start(1)
        (told,) = [finding for finding in report.findings if finding.outcome == "warning"]
        assert not report.failed and "1 of 200 records cannot be used" in told.text and "nowhere/0.png" in told.text
        if look is build_data:
            assert str(inputs.shards / "rejected.jsonl") in told.text
            assert (inputs.shards / "rejected.jsonl").read_text().count("nowhere") == 1
    (failed,) = start(4)[0].failed
    assert (
        "4 problems in 200 records" in failed.text and "2.0% of the records cannot be used, and 1.0% may" in failed.text
    )
    assert not start(4, max_bad_fraction=0.02)[0].failed
    (failed,) = start(4)[0].failed  # and again where its shards lie there
    assert "4 " in failed.text
    (failed,) = start(1, on_bad_sample="raise")[0].failed  # not in silence, as the shards of the first start would
    assert "1 problems in 200" in failed.text
    report, inputs = start(200)
    text = report.failed[0].text
    assert "200 of the first 200 pictures" in text and str(tmp_path / "data" / "nowhere" / "0.png") in text
    assert f"looked for from {tmp_path / 'data'}" in text and "--image-root" in text
    if look is build_data:
        assert len(Path(f"{inputs.shards}.rejected.jsonl").read_text().splitlines()) == 200


def test_a_wrong_image_root_is_named_with_the_right_one(tmp_path, processor):
    path = write_records(tmp_path / "data" / "pictures", 20)
    moved = path.rename(tmp_path / "data" / "train.json")
    report, inputs = Report(), opened(tmp_path, moved, image_root=str(tmp_path / "elsewhere"))
    check_data(report, inputs, CONFIG.replace(on_bad_sample="skip"), processor, tmp_path / "cache")
    assert f"--image-root {tmp_path / 'data' / 'pictures'}" in report.failed[0].text
    assert str(tmp_path / "elsewhere" / "red.png") in report.failed[0].text


def test_tars_are_checked_and_indexed_where_they_lie(tmp_path, processor):
    path = write_records(tmp_path / "data", 4)
    members = []
    for record in json.loads(path.read_text()):
        members.append((f"{record['id']}.png", (path.parent / record["image"]).read_bytes()))
        members.append((f"{record['id']}.json", json.dumps({"conversations": record["conversations"]}).encode()))
    tar = write_tar(tmp_path / "tars" / "a.tar", members)
    report, inputs = Report(), opened(tmp_path, tar, data_format="webdataset")
    check_data(report, inputs, CONFIG, processor, tmp_path / "cache")
    build_data(report, inputs, CONFIG, processor, tmp_path / "cache")
    assert not report.failed and len(Dataset([inputs.shards])) == 4 and not list(inputs.shards.glob("*.tar"))

    write_tar(tar, [*members, ("bad.png", b"no picture"), ("bad.json", members[1][1])])
    report, inputs = Report(), opened(tmp_path, tar, data_format="webdataset")
    check_data(report, inputs, CONFIG, processor, tmp_path / "cache")
    assert "bad" in str(report.failed) and "a.tar" in str(report.failed)
