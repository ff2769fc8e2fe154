"""Building: the same bytes from any number of processes and after any kill; problems are all reported; the halves."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.data.shards import build
from megatron_vlm.data.shards.split import SplitSettings
from megatron_vlm.errors import ConfigError, DataError
from tests.data.formats.make import built, picture, write_json, write_pictures

SAMPLES = 60


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def tmp_path(memory_dir):
    """A folder in memory: builds sync every file they finish, and a disk takes its time over that."""
    with tempfile.TemporaryDirectory(dir=memory_dir) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Records in two files, some with images that others have too, some bad."""
    folder = write_pictures(tmp_path_factory.mktemp("inputs"), 40)
    records = []
    for i in range(SAMPLES):
        images = [f"{i % 40}.png", f"{i // 3}.png"] if i % 4 == 0 else [f"{i % 40}.png"]
        if i % 7 == 3:
            images = []
        if i % 11 == 5:
            images = ["missing.png"]
        marks = "<image>" * len(images)
        records.append(
            {"id": i // 2, "image": images, "topic": i % 5, "conversations": talk(f"{marks} {i}?", f"It is {i}.")}
        )
    write_json(folder / "a.json", records[:35])
    write_json(folder / "b.jsonl", records[35:])
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(inputs, out, *more):
    words = ["build", "--format", "llava", "--input", str(inputs / "a.json"), str(inputs / "b.jsonl")]
    words += ["--image-root", str(inputs), "--out", str(out), "--samples-per-shard", "4", "--on-bad-sample", "skip"]
    words += ["--max-bad-fraction", "0.5"]
    return ["data", *words, *more]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What an uninterrupted build writes, in this process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(inputs, out, "--workers", "0")) == 0
    return content(out)


def test_contents(whole):
    manifest = json.loads(whole["manifest.json"])
    rejected = [json.loads(line) for line in whole["rejected.jsonl"].splitlines()]
    assert len(manifest["shards"]) == SAMPLES // 4 and manifest["samples"] + len(rejected) == SAMPLES
    assert [(Path(r["file"]).name, r["record"]) for r in rejected][:2] == [("a.json", 5), ("a.json", 16)]
    assert all("missing.png: No such file" in r["reason"] for r in rejected)
    a, b = manifest["sources"]
    assert (a["name"], a["first_sample"], b["name"], b["first_sample"]) == ("a.json", 0, "b.jsonl", a["samples"])


def test_processes_write_the_same(inputs, whole, tmp_path):
    assert main(command(inputs, tmp_path / "out", "--workers", "2")) == 0
    assert content(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_one_shard_is_not_worth_a_process(inputs, tmp_path, monkeypatch):
    words = ["--workers", "2", "--samples-per-shard"]
    assert main(command(inputs, tmp_path / "alone", "--workers", "0", *words[2:], "60")) == 0
    monkeypatch.setattr(build, "ProcessPoolExecutor", None)  # calling it would raise
    assert main(command(inputs, tmp_path / "out", *words, "60")) == 0
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert main(command(inputs, tmp_path / "two", *words, "59")) == 1


def start(inputs, out, log, workers):
    code = "from megatron_vlm.cli.main import main; import sys; sys.exit(main())"
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, *command(inputs, out, "--workers", str(workers))],
            stdout=file, stderr=file, cwd=Path(__file__).parents[3], start_new_session=True,
        )  # fmt: skip


def files_in(folder):
    return sum(len(files) for _, _, files in os.walk(folder))  # which may vanish meanwhile


NURSERY = """
import json, os, sys
from megatron_vlm.cli.main import main
import megatron_vlm.data.shards.build
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        os._exit(main(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_killed_at_any_moment_and_started_again(inputs, whole, tmp_path):
    """kill -9 at 20 random moments, of which most fall between the first and the last file.

    The builds are forks of one process that has imported everything: starting Python takes longer than building.
    """
    draw, kills, number = random.Random(3), 0, 0
    with open(tmp_path / "log", "w") as log:
        nursery = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=Path(__file__).parents[3],
        )  # fmt: skip

    def begin(out):
        # Every eighth folder is built with a worker process.
        nursery.stdin.write(json.dumps(command(inputs, out, "--workers", str(int(number % 8 == 1)))) + "\n")
        nursery.stdin.flush()
        return int(nursery.stdout.readline())

    while kills < 20:
        out = tmp_path / f"{number}" / "out"
        out.parent.mkdir()
        partial, code = out.parent / ".out.partial", None
        while code != 0 and not out.exists():
            # So many files more than now, and then up to a few milliseconds.
            wanted = files_in(partial) + draw.randrange(1, 40)
            pid = begin(out)
            while not out.exists() and files_in(partial) < wanted and psutil.pid_exists(pid):
                time.sleep(0.001)
            time.sleep(draw.random() * 0.004)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = int(nursery.stdout.readline())
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        begin(out)
        if int(nursery.stdout.readline()) != 0:  # the last run had ended, so this one finds a whole folder
            assert "is not an empty folder" in (tmp_path / "log").read_text()
        assert content(out) == whole
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        number += 1
    nursery.stdin.close()
    assert nursery.wait() == 0 and number >= 2


def test_workers_end_with_a_killed_build(inputs, tmp_path):
    process = start(inputs, tmp_path / "out", tmp_path / "log", workers=1)
    me, deadline = psutil.Process(process.pid), time.monotonic() + 60
    while len(me.children()) < 2:  # the worker, and what tracks its resources
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = me.children()
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_other_inputs_start_anew(inputs, tmp_path):
    """What a killed build of something else has left is not taken for this one's."""
    partial = tmp_path / ".out.partial"
    (partial / "done").mkdir(parents=True)
    (partial / "out").mkdir()
    (partial / "out" / "shard-000099.tar").write_bytes(b"old")
    (partial / "done" / "shard-000000.json").write_text("{}")
    (partial / "build.json").write_text("another")
    built(tmp_path / "out", "llava", write_json(tmp_path / "t.json", [{"conversations": talk("a", "b")}]))
    assert sorted(content(tmp_path / "out")) == [
        "manifest.json", "shard-000000.images.npy", "shard-000000.samples.npy", "shard-000000.tar",
    ]  # fmt: skip


def test_two_builds_of_one_folder(inputs, tmp_path):
    for number in range(20):  # on a busy machine a build may be over before it is stopped
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        process, partial = start(inputs, out, tmp_path / "log", workers=0), out.parent / ".out.partial" / "build.json"
        while not partial.exists() and process.poll() is None:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGSTOP)
        if partial.exists():
            break
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait() == 0
    with pytest.raises(ConfigError, match="another process builds"):
        built(out, "llava", inputs / "a.json", root=str(inputs))
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 0 and (out / "manifest.json").exists()


def test_every_problem_is_reported_with_counts(inputs, tmp_path):
    bad = [
        {"conversations": talk("a")},
        {"conversations": talk("a", "")},
        {"image": "0.png", "conversations": talk("a", "b")},
    ]
    path = write_json(tmp_path / "c.jsonl", bad)
    (tmp_path / "d.json").write_text('[{"conversations": 3},\n {"a": ]')
    with pytest.raises(DataError) as caught:
        built(tmp_path / "out", "llava", inputs / "a.json", path, tmp_path / "d.json", root=str(inputs))
    text = str(caught.value)
    for words in (
        "a.json, record 5: cannot read image", "c.jsonl, record 1: empty answer", "d.json: record 1: bad json",
        "line 2 column 8", "by kind:\n         3  missing image", "1  empty answer",
        "correct the file: what follows",
    ):  # fmt: skip
        assert words in text, words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "d.json", "out.rejected.jsonl"]
    assert f"all are listed in {tmp_path / 'out.rejected.jsonl'}" in text
    with pytest.raises(DataError, match="cannot be read"):  # no policy goes past a broken array
        built(tmp_path / "out", "llava", tmp_path / "d.json", on_bad_sample="skip")


def images_in(samples):
    return {image for sample in samples for image in sample.images}


@pytest.mark.parametrize("by", ["image", "id", "topic"])
def test_halves_share_nothing(inputs, tmp_path, by):
    """The same image under two names is one image."""
    (inputs / "copy.png").write_bytes(picture(3))
    records = [json.loads(line) for line in (inputs / "b.jsonl").read_text().splitlines()]
    records = [r for r in records if r["image"] != ["missing.png"]]
    records += [
        {"id": f"x{i}", "image": "copy.png", "topic": f"t{i}", "conversations": talk("<image>", "a")} for i in range(2)
    ]
    path = write_json(tmp_path / "c.jsonl", records)
    settings = SplitSettings(fraction=0.4 if by == "topic" else 0.3, by=by, seed=5)
    try:
        from megatron_vlm.data.formats import open_sources
        from megatron_vlm.data.shards.build import build_shards

        sources = open_sources("llava", [path], root=str(inputs), repeat=[2])
        report = build_shards(sources, tmp_path / "out", split=settings, samples_per_shard=7)
    except ConfigError as error:
        assert by == "topic" and "what belongs together is larger" in str(error)
        return
    from tests.data.formats.make import samples_of

    train, val = samples_of(tmp_path / "out" / "train"), samples_of(tmp_path / "out" / "val")
    assert len(train) + len(val) == len(records) and len(val) == report["records"]["val"]
    assert 0 < len(val) <= settings.fraction * len(records) + 0.5
    assert not images_in(train) & images_in(val)
    assert len({s.key for s in (*train, *val)}) == len(records)
    if by == "id":
        number = {sample.key: records[int(sample.key.rsplit("-", 1)[1])]["id"] for sample in (*train, *val)}
        assert not {number[s.key] for s in train} & {number[s.key] for s in val}
    assert report["train"]["sources"][0]["repeat"] == 2 and report["val"]["sources"][0]["repeat"] is None
    assert json.loads((tmp_path / "out" / "split.json").read_text())["realised_fraction"] == report["realised_fraction"]


def test_split_of_records_that_all_belong_together(inputs, tmp_path):
    records = [{"image": "0.png", "conversations": talk("<image>", "a")}] * 4
    path = write_json(tmp_path / "c.jsonl", records)
    with pytest.raises(ConfigError, match="smallest group has 4 records"):
        built(tmp_path / "out", "llava", path, root=str(inputs), split=SplitSettings(fraction=0.5))
    with pytest.raises(ConfigError, match="--split-by nothing: no record has this key"):
        built(tmp_path / "out", "llava", path, root=str(inputs), split=SplitSettings(fraction=0.5, by="nothing"))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        SplitSettings(fraction=1.5)


def test_repeat_globs_and_split_from_the_command_line(inputs, tmp_path, capsys):
    for name in ("x1.json", "x2.json", "y.json"):
        write_json(
            tmp_path / name, [{"id": name + str(i), "conversations": talk(f"{name} {i}", "b")} for i in range(10)]
        )
    words = ["data", "build", "--format", "llava", "--out", str(tmp_path / "out"), "--workers", "0"]
    globs = ["--input", str(tmp_path / "x*.json"), str(tmp_path / "y.json"), "--repeat", "0.5", "3"]
    assert main([*words, *globs, "--val-fraction", "0.2", "--split-by", "id"]) == 0
    out = capsys.readouterr().out
    assert "24 samples, 0 images" in out and "6 samples, 0 images" in out and "an epoch reads 0.5 times" in out
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert [s["repeat"] for s in manifest["sources"]] == [0.5, 0.5, 3]
    for bad, message in (
        (["--input", str(tmp_path / "z*.json")], "no file matches"),
        ([*globs, "2"], "--repeat has 3 numbers for 2 inputs"),
        (["--input", str(tmp_path / "y.json"), "--repeat", "0"], "--repeat must be above 0"),
        (["--input", str(tmp_path / "y.json"), "--video-frames", "4", "2"], "1 <= MIN <= MAX"),
        (["--input", str(tmp_path / "y.json"), "--frame-text", "no"], "must hold <image> once"),
        (["--input", str(tmp_path / "y.json"), "--workers", "-1"], "--workers must be at least 0"),
        (["--input", str(tmp_path / "y.json"), "--split-by", "id"], "go with --val-fraction"),
        (["--input", str(tmp_path / "y.json"), "--split", "val"], "chooses among the files of a folder or a glob"),
    ):
        assert main([*words[:5], str(tmp_path / "new"), *bad]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
