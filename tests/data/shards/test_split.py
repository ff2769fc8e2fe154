"""Halves of tars that stay as they are: drawn as those of records, each an index of its own samples, read like any folder."""

import json
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.cli.data import run
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.shards.split import SplitSettings
from megatron_vlm.data.stream.counts import TokenCounts
from megatron_vlm.data.stream.loader import RowLoader, evaluation_rows
from megatron_vlm.data.view.check import check_folder
from megatron_vlm.errors import ConfigError, DataError
from tests.data.formats.make import picture, samples_of, write_json, write_pictures, write_tar

SAMPLES, PICTURES = 48, 30


def talk(images, question, answer="yes"):
    return [{"from": "human", "value": "<image>" * images + question}, {"from": "gpt", "value": answer}]


def records():
    """Records of which some share a picture, an id or a topic, and some have none of the three."""
    for i in range(SAMPLES):
        images = [i % PICTURES] if i % 5 else [i % PICTURES, i // 2]
        images = [] if i % 7 == 3 else images
        topic = {"topic": f"t{i // 2}"} if i % 3 else {}
        yield {
            "id": i // 2,
            **topic,
            "image": [f"{n}.png" for n in images],
            "conversations": talk(len(images), f"{i}?"),
        }


def members(folder, some):
    """The members of a tar of these records."""
    for number, record in some:
        for i, name in enumerate(record["image"]):
            yield f"{number:04d}.{i}.png", (folder / name).read_bytes()
        yield f"{number:04d}.json", json.dumps(record).encode()


@pytest.fixture
def tmp_path(memory_dir):
    """A folder in memory: builds sync every file they finish, and a disk takes its time over that."""
    with tempfile.TemporaryDirectory(dir=memory_dir) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The same records as json, and in tars of seven, in this order; with a tar of nothing among them."""
    folder = write_pictures(tmp_path_factory.mktemp("inputs"), PICTURES)
    write_json(folder / "all.json", list(records()))
    some = list(enumerate(records()))
    for tar in range(0, SAMPLES, 7):
        write_tar(folder / "tars" / f"{tar:02d}.tar", members(folder, some[tar : tar + 7]))
    write_tar(folder / "tars" / "15-empty.tar", [])
    return folder


def split(out, format, *paths, fraction=0.3, by="image", seed=5, build=None, **settings):
    """Builds two halves and returns (report, samples of train, samples of val), which must check."""
    chosen = SplitSettings(fraction=fraction, by=by, seed=seed)
    report = build_shards(open_sources(format, paths, **settings), out, split=chosen, **(build or {}))
    for half in ("train", "val"):
        assert not [
            problem
            for problem in check_folder(out / half)
            if isinstance(problem, DataError) and not problem.reason.is_warning
        ]
    train, val = samples_of(out / "train"), samples_of(out / "val")
    assert report["records"] == {"train": len(train), "val": len(val)}
    assert report["realised_fraction"] == round(len(val) / (len(train) + len(val)), 6)
    assert json.loads((out / "split.json").read_text()) == json.loads(json.dumps(report))
    assert not {i for s in train for i in s.images} & {i for s in val for i in s.images}
    return report, train, val


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def contents(samples):
    return [(sample.turns, sample.images) for sample in samples]


@pytest.mark.parametrize("by", ["image", "id", "topic"])
def test_the_halves_are_those_of_the_same_records_in_json(inputs, tmp_path, by):
    before = content(inputs / "tars")
    expected, train, val = split(tmp_path / "json", "llava", inputs / "all.json", root=str(inputs), by=by)
    report, *halves = split(tmp_path / "tars", "webdataset", inputs / "tars", by=by, repeat=[1.5])
    assert [contents(half) for half in halves] == [contents(train), contents(val)] and 5 < len(val) < SAMPLES // 3
    drawn = ("records", "realised_fraction", "components", "largest_component", "without_key", "images_per_record")
    assert [report[name] for name in drawn] == [expected[name] for name in drawn]
    assert content(inputs / "tars") == before and not list((tmp_path / "tars").rglob("*.tar"))
    assert [report[half]["sources"][0]["repeat"] for half in ("train", "val")] == [1.5, None]
    # Shards of one name are one tar's; a tar that gives a half nothing is not named there.
    for half in ("train", "val"):
        for line in report[half]["shards"]:
            assert line["samples"] and line["tar"].endswith(".tar") and "empty" not in line["tar"]
            assert line["name"] == f"shard-{sorted(before).index(line['tar'].rsplit('/')[-1]):06d}.tar"


def test_the_seed_draws(inputs, tmp_path):
    _, *first = split(tmp_path / "first", "webdataset", inputs / "tars")
    split(tmp_path / "again", "webdataset", inputs / "tars")
    assert content(tmp_path / "again") == content(tmp_path / "first")
    assert contents(split(tmp_path / "other", "webdataset", inputs / "tars", seed=6)[2]) != contents(first[1])


def test_by_webdatasets_key(inputs, tmp_path):
    """The members of one key in several tars, as data sets have them that are several tables of one list."""
    some = list(enumerate(records()))[3::7]  # without pictures
    for name in "ab":
        write_tar(
            tmp_path / f"{name}.tar",
            members(inputs, [(i, r | {"conversations": talk(0, f"{name}{i}")}) for i, r in some]),
        )
    _, train, val = split(tmp_path / "out", "webdataset", tmp_path / "*.tar", by="__key__")
    assert len(train) + len(val) == 2 * len(some) and val and not {s.key for s in train} & {s.key for s in val}
    with pytest.raises(ConfigError, match="--split-by colour: no record has this key"):
        split(tmp_path / "no", "webdataset", tmp_path / "*.tar", by="colour")


def test_a_tar_that_two_inputs_name(inputs, tmp_path):
    """Each of its samples, also one without pictures, is in one half, as often as it is named."""
    link = tmp_path / "link.tar"
    link.symlink_to(inputs / "tars" / "00.tar")
    report, train, val = split(
        tmp_path / "out", "webdataset", inputs / "tars", link, inputs / "tars" / "00.tar", repeat=[1, 2, 0.5], seed=9
    )
    texts = [[sample.turns[0].text for sample in half] for half in (train, val)]
    assert not set(texts[0]) & set(texts[1]) and len(texts[0]) + len(texts[1]) == SAMPLES + 14
    alone = [record["conversations"][0]["value"] for record in list(records())[:7] if not record["image"]]
    assert alone and all(sum(half.count(text) for half in texts) == 3 for text in alone)
    assert [source["repeat"] for source in report["train"]["sources"]] == [1, 2, 0.5]
    first = [source["first_sample"] for source in report["train"]["sources"]]
    assert first == [0, *np.cumsum([source["samples"] for source in report["train"]["sources"]])[:-1].tolist()]


def test_what_is_rejected_is_in_neither_half(inputs, tmp_path):
    folder = shutil.copytree(inputs / "tars", tmp_path / "in")
    (folder / "07.tar").write_bytes((folder / "07.tar").read_bytes()[:1000])
    bad = {"half": picture(50)[:60], "other": b"<html>"}
    for name, data in bad.items():  # parsed and drawn, and then the picture cannot be decoded
        text = json.dumps({"conversations": talk(1, name)}).encode()
        write_tar(folder / f"99-{name}.tar", [(f"{name}.png", data), (f"{name}.json", text)])
    write_tar(folder / "99-text.tar", [("c.txt", b"")])
    with pytest.raises(DataError, match="4 problems in 45 records") as caught:
        split(tmp_path / "out", "webdataset", folder)
    assert not (tmp_path / "out").exists() and "99-half.tar, record 0, sample half: image" in str(caught.value)
    _, train, val = split(tmp_path / "out", "webdataset", folder, build={"on_bad_sample": "skip"})
    assert len(train) + len(val) == SAMPLES - 7 and "empty answer" in (tmp_path / "out" / "rejected.jsonl").read_text()
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["record"], r.get("key")) for r in rejected] == [(-1, None), (0, "half"), (0, "other"), (0, "c")]
    for names, message in ((["07.tar"], "cut short"), (["none.tar"], "the tar is missing")):
        with pytest.raises(DataError, match=message):  # and not that no record has the key
            split(tmp_path / "no", "webdataset", *(folder / name for name in names), by="id")


def test_one_part_of_an_energon_folder(inputs, tmp_path):
    folder = shutil.copytree(inputs / "tars", tmp_path / "in")
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / "dataset.yaml").write_text("sample_type: {__class__: CrudeWebdataset}\n")
    parts = "train: ['{00,07,14,21}.tar'], val: ['{28,35}.tar']"
    (folder / ".nv-meta" / "split.yaml").write_text(f"exclude: [21.tar]\nsplit_parts: {{{parts}}}\n")
    for part, number in (("train", 21), ("val", 14)):
        report, train, val = split(tmp_path / part, "webdataset", folder, part=part)
        assert len(train) + len(val) == number and val
        assert report["train"]["layouts"] == report["val"]["layouts"]


def test_a_killed_build_goes_on_with_the_tars_that_are_left(inputs, tmp_path):
    split(tmp_path / "whole", "webdataset", inputs / "tars")
    draw, kills = random.Random(1), 0
    sources, out, partial = open_sources("webdataset", [inputs / "tars"]), tmp_path / "out", tmp_path / ".out.partial"

    def build(wanted):
        def progress(_):
            if len(list((partial / "done").iterdir())) == wanted:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            build_shards(sources, out, split=SplitSettings(fraction=0.3, seed=5), progress=progress)
        finally:
            os._exit(int(not out.exists()))

    made = {}
    while not out.exists():
        wanted = len(made) + draw.randint(1, 3)
        child = os.fork()
        if not child:
            build(wanted)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        done = {p.name: p.stat().st_mtime_ns for p in (partial / "done").glob("*")} if partial.exists() else made
        assert made.items() <= done.items()  # none is made again
        made = done
    assert kills >= 2 and made and content(out) == content(tmp_path / "whole") and not partial.exists()


def test_halves_are_other_data(inputs, tmp_path, make_processor):
    """One tar in both: data digests differ, token counts in a cache are apart, a resume tells one from the other."""
    out = tmp_path / "out"
    _, train, val = split(out, "webdataset", inputs / "tars", fraction=0.5)
    halves = {half: Dataset([out / half]) for half in ("train", "val")}
    assert {s.sha256 for s in halves["train"].shards} == {s.sha256 for s in halves["val"].shards}
    assert halves["train"].digest != halves["val"].digest
    config = DataConfig(seq_length=256, packing=True, num_workers=0)
    processor = make_processor(config)
    beside = {half: TokenCounts(dataset, processor)(np.arange(len(dataset))) for half, dataset in halves.items()}
    for half, dataset in halves.items():
        for path in (out / half).glob("*.tokens.npy"):
            path.unlink()
            path.mkdir()  # the tests may run as root, whom no permission stops
        table = TokenCounts(dataset, processor, cache_dir=tmp_path / "cache")(np.arange(len(dataset)))
        assert (table == beside[half]).all()
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == sum(len(dataset.shards) for dataset in halves.values())
    sizes = {"dp_rank": 0, "dp_size": 1, "micro_batch_size": 1}

    def loader(half, state=None):
        options = {"seed": 3, "global_batch_size": 2, "cache_dir": tmp_path / "cache", "state": state, **sizes}
        return RowLoader(config, processor, paths=[out / half], **options)

    first = loader("train")
    seen, step = [], None
    while len(seen) < len(train):
        step = first.next_step()
        seen += [key for row in step.rows for key in row.keys]
    assert sorted(seen[: len(train)]) == sorted(sample.key for sample in train)
    with pytest.raises(ConfigError, match="the checkpoint was trained on other data: data"):
        loader("val", step.state)
    rows = evaluation_rows(config, processor, paths=[out / "val"], cache_dir=tmp_path / "cache", **sizes)
    assert sorted(key for row in rows for key in row.keys) == sorted(sample.key for sample in val)


def test_the_commands_on_halves_of_tars(inputs, tmp_path, idefics2_dir, capsys):
    words = ["build", "--format", "webdataset", "--input", str(inputs / "tars"), "--out", str(tmp_path / "out")]
    assert run([*words, "--val-fraction", "0.3", "--split-by", "topic", "--split-seed", "5", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    train, val = (len(samples_of(tmp_path / "out" / half)) for half in ("train", "val"))
    assert f"out/train: {train} samples" in out and f"out/val: {val} samples" in out and "tars as they are" in out
    assert f"{val / SAMPLES:.4f} of the records for validation, by topic" in out
    model = ["--model", str(idefics2_dir), "--seq-length", "256"]
    assert run(["check", str(tmp_path / "out" / "val"), *model]) == 0
    assert f"{val} sound samples, 0 problems" in capsys.readouterr().out
    assert run(["stats", str(tmp_path / "out" / "train"), *model]) == 0
    assert f"{train}" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert run(["preview", str(tmp_path / "out" / "val"), *model, "--samples", "4", "--out", str(page)]) == 0
    assert page.read_text().count("<h3>") >= 4
