"""``megatron-vlm data``: build and check as a user runs them."""

import json
import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from megatron_vlm.cli import data_check
from megatron_vlm.cli.data import run
from megatron_vlm.cli.main import main
from megatron_vlm.data.formats.records import VideoSettings


@pytest.fixture
def records(tmp_path):
    """A json and a jsonl file of two records each, and their image."""
    Image.new("RGB", (20, 10), (200, 10, 10)).save(tmp_path / "red.png")
    talk = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
    lines = [json.dumps({"image": image, "conversations": talk}) for image in ("red.png", str(tmp_path / "red.png"))]
    (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    return tmp_path


def build(folder, *inputs, **options):
    words = ["build", "--format", options.pop("format", "llava"), "--input", *(str(folder / name) for name in inputs)]
    words += ["--image-root", str(options.pop("root", folder)), "--out", str(folder / "out")]
    return [*words, *options.pop("more", ())]


def test_build_then_check(records, capsys):
    assert run(build(records, "a.json", "b.jsonl", more=["--samples-per-shard", "3"])) == 0
    assert "4 samples, 4 images, 2 shards" in capsys.readouterr().out
    assert run(["check", str(records / "out")]) == 0
    assert "4 sound samples, 0 problems" in capsys.readouterr().out


def test_bar_on_a_terminal(records):
    """It knows the number of records before they are parsed."""
    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "megatron_vlm",
        "data",
        *build(records, "a.json", "b.jsonl", more=["--workers", "0"]),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, timeout=120)
    os.close(follower)
    shown = os.read(leader, 2**16).decode()
    os.close(leader)
    assert done.returncode == 0 and b"4 samples" in done.stdout, shown
    assert "building" in shown and "4/4" in shown and "0/4" in shown, shown


def test_check_reports_and_exits_1(records, capsys):
    run(build(records, "a.json"))
    shard = records / "out" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    assert run(["check", str(records / "out")]) == 1
    out = capsys.readouterr().out
    assert "shard-000000.tar, at 0: damaged: its crc32 differs" in out and "1 sound samples, 2 problems" in out
    assert run(["check", str(records)]) == 1
    assert "no manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize("format", [None, "llava"])
def test_check_takes_frames_as_the_model_does(records, monkeypatch, format):
    """As `launch` takes them, whose shards are what is checked."""
    taken, own = [], VideoSettings(sampling="pairs", fps=3.0, max_frames=20)
    monkeypatch.setattr(data_check, "check_sources", lambda sources, processor: taken.extend(sources) or ())
    args = SimpleNamespace(
        paths=[str(records / "a.json")], part="", format=format, image_root=None, missing_placeholder=None
    )
    assert data_check.check(args, SimpleNamespace(video=own), "internvl") == 0
    assert [source.video for source in taken] == [own]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "lava"}, "unknown format 'lava' (did you mean 'llava'?)"),
        ({"root": "/nowhere"}, "--image-root /nowhere is not a folder"),
        ({"more": ["--samples-per-shard", "0"]}, "samples_per_shard must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(records, capsys, options, message):
    assert main(["data", *build(records, "a.json", **options)]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (records / "out").exists()


def test_bad_record_is_named(records, capsys):
    (records / "red.png").write_bytes(b"not an image")
    assert main(["data", *build(records, "b.jsonl")]) == 1
    error = capsys.readouterr().err
    assert "b.jsonl" in error and "record 0" in error and "red.png is not a readable" in error
    assert not (records / "out").exists()
