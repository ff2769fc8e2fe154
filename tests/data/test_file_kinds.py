"""An input of another format than was given for it: called by what it is, with what reads it."""

import json
import typing

import pyarrow
import pytest
from pyarrow import parquet

from megatron_vlm.cli.main import main
from megatron_vlm.data.file_kinds import _FITS, other_format
from megatron_vlm.data.formats import NAMES
from megatron_vlm.options.launch_config import LaunchConfig
from tests.data.formats.make import picture, write_json, write_pictures, write_tar

TALK = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
READ_BY = {
    "talk.json": ("llava", "xcomposer", "internvl"),
    "talk.jsonl": ("llava", "xcomposer", "internvl"),
    "messages.json": ("openai",),
    "messages.jsonl": ("openai",),
    "meta.json": ("internvl",),
    "rows.parquet": ("parquet",),
    "samples.tar": ("webdataset",),
    "tars": ("webdataset",),
    "rows": ("parquet",),
}


@pytest.fixture
def inputs(tmp_path):
    """One input of each kind."""
    for suffix in ("json", "jsonl"):
        write_json(tmp_path / f"talk.{suffix}", [{"id": i, "conversations": TALK} for i in range(3)])
        write_json(tmp_path / f"messages.{suffix}", [{"messages": MESSAGES}])
    write_json(
        tmp_path / "meta.json",
        {"a": {"root": ".", "annotation": "talk.jsonl", "data_augment": False, "repeat_time": 1}},
    )
    parquet.write_table(pyarrow.table({"messages": [MESSAGES]}), tmp_path / "rows.parquet")
    write_tar(tmp_path / "samples.tar", [("0.png", picture()), ("0.txt", b"x")])
    for folder, name in (("tars", "samples.tar"), ("rows", "rows.parquet")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes((tmp_path / name).read_bytes())
    return tmp_path


def test_every_format_tells_the_others_apart(inputs):
    for name, formats in READ_BY.items():
        for format in NAMES:
            said = other_format(inputs / name, format)
            assert bool(said) == (format not in formats), (name, format, said)
            assert not said or any(f"--format {reader}" in said for reader in formats), (name, said)


def test_what_is_not_known_is_left_to_its_reader(inputs):
    for name, content in (
        ("odd.json", b"[7]"),
        ("cut.json", b'[{"conversations": [{'),
        ("text", b"hello"),
        ("none", b""),
    ):
        (inputs / name).write_bytes(content)
        assert not other_format(inputs / name, "llava")
    assert not other_format(inputs / "absent.json", "parquet")
    assert "json" in other_format(inputs / "odd.json", "parquet")


def test_build_and_check_say_what_reads_it(inputs, capsys):
    for format, name in (
        ("parquet", "talk.json"),
        ("webdataset", "talk.json"),
        ("llava", "rows.parquet"),
        ("llava", "samples.tar"),
    ):
        for words in (
            ["build", "--input", str(inputs / name), "--out", str(inputs / "out")],
            ["check", str(inputs / name)],
        ):
            assert main(["data", *words, "--format", format]) == 1
            said = capsys.readouterr().err
            assert f"--format {format} does not read {inputs / name}: it seems to be" in said, said
            assert f"--format {READ_BY[name][0]}" in said and "damaged" not in said


def test_shards_need_no_format(digits_dir, capsys):
    assert main(["data", "check", str(digits_dir), "--format", "llava"]) == 1
    said = capsys.readouterr().err
    assert f"{digits_dir}: it seems to be a folder of shards" in said and "check it without --format" in said


@pytest.mark.parametrize(
    "change, cause",
    [
        ({"conversations": 7}, "--format is another than that of the records"),
        ({"conversations": [], "image": None}, "--format is another than that of the records"),
        ({"image": "none.png", "conversations": [{"from": "human", "value": "<image>a"}, TALK[1]]}, "the cause above"),
        ({"image": "0.png", "conversations": TALK}, "--missing-placeholder prepend puts it there"),
    ],
)
def test_where_every_record_is_bad_the_likely_cause_is_named(tmp_path, capsys, change, cause):
    """Leaving them out would leave nothing."""
    write_pictures(tmp_path, 1)
    path = write_json(tmp_path / "bad.json", [change] * 3)
    words = [
        "data",
        "build",
        "--format",
        "llava",
        "--input",
        str(path),
        "--image-root",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    for policy in ("raise", "skip"):
        assert main([*words, "--on-bad-sample", policy, "--workers", "0"]) == 1
        said = capsys.readouterr().err
        last = said.strip().splitlines()[-1]
        assert last.startswith("not one record can be used: ") and cause in last, said
        assert "--on-bad-sample skip" not in said and "allow more" not in said
    # With a good one among them the advice is what it was.
    write_json(path, [change, {"conversations": TALK}])
    assert main([*words, "--workers", "0"]) == 1 and "set --on-bad-sample skip" in capsys.readouterr().err
    assert json.loads(path.read_text())[1] == {"conversations": TALK}


def test_every_format_is_known_wherever_formats_are_named():
    """A format added to FORMATS alone would end in a traceback here, or be refused by ``launch``."""
    assert set(_FITS) == set(NAMES)
    hint = typing.get_type_hints(LaunchConfig)["data_format"]
    assert {name for part in typing.get_args(hint) for name in typing.get_args(part)} == set(NAMES)
