"""Tars of other tools: used where they lie, and what each kind of sample becomes."""

import gzip
import json

import numpy as np
import pytest

from megatron_vlm.data.formats import open_sources, read_source
from megatron_vlm.data.formats.energon import count_braces
from megatron_vlm.data.formats.records import Record
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.split import SplitSettings
from megatron_vlm.data.view.check import check_folder, check_sources
from megatron_vlm.errors import DataError, Reason
from tests.data.formats.make import built, picture, write_tar

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]


def members(number, text=None):
    for i in range(number):
        yield f"{i:04d}.jpg", picture(i, kind="JPEG")
        yield f"{i:04d}.json", json.dumps({"conversations": text or TALK}).encode()


def test_llava_records_in_tars(tmp_path):
    tars = [write_tar(tmp_path / "in" / f"{i}.tar", members(3 + i)) for i in range(2)]
    before = [path.read_bytes() for path in tars]
    manifest, samples = built(tmp_path / "out", "webdataset", tmp_path / "in", repeat=[0.5])
    assert [shard["samples"] for shard in manifest["shards"]] == [3, 4]
    assert manifest["sources"] == [{"name": "in", "first_sample": 0, "samples": 7, "repeat": 0.5, "per_epoch": None}]
    assert [path.read_bytes() for path in tars] == before
    assert not list((tmp_path / "out").glob("*.tar"))
    assert [s.key for s in samples] == ["0000", "0001", "0002", "0000", "0001", "0002", "0003"]
    assert samples[5].images == (picture(2, kind="JPEG"),) and samples[5].image_names == ("0002.jpg",)
    assert [t.text for t in samples[0].turns] == ["<image>\nWhat?", "Red."]
    assert list(check_folder(tmp_path / "out")) == [s.key for s in samples]
    table = np.load(tmp_path / "out" / "shard-000001.images.npy")
    assert table["width"].tolist() == [20, 21, 22, 23] and table["height"].tolist() == [12] * 4


def test_workers_make_the_same_index_of_each_half(tmp_path):
    for i in range(3):
        write_tar(tmp_path / "in" / f"{i}.tar", members(2 + i))
    sources = open_sources("webdataset", [tmp_path / "in" / "*.tar"])
    for name, workers in (("a", 0), ("b", 2)):
        build_shards(sources, tmp_path / name, num_workers=workers, split=SplitSettings(fraction=0.4, seed=2))
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_openai_and_captions_and_folders_and_long_names(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "Which?"}, {"type": "image"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Both."}]
    long = "d/" * 70 + "long"
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("x/a.0.png", picture(0)),
            ("x/a.1.png", picture(1)),
            ("x/a.json", json.dumps({"messages": talk}).encode()),
            (f"{long}.png", picture(2)),
            (f"{long}.txt", b" a caption\n"),
        ],
        format=2,  # pax: the long name needs an extension header
    )
    _, samples = built(tmp_path / "out", "webdataset", path)
    assert [t.text for t in samples[0].turns] == ["<image>Which?<image>", "Both."]
    assert samples[0].images == (picture(0), picture(1))
    assert [t.text for t in samples[1].turns] == ["<image>", "a caption"]
    assert samples[1].key == long and samples[1].images == (picture(2),)


ENERGON = {
    "CaptioningSample": ("field_map: {image: 'png,jpg', caption: 'json[captions][1]'}", ["<image>", "two"]),
    "VQASample": (
        "field_map: {image: jpg, context: 'json[q]', answers: 'json[a]', answer_weights: 'json[w]'}",
        ["<image>\nWhy?", "since"],
    ),
    "CrudeWebdataset": ("", ["<image>\nWhat?", "Red."]),
}


@pytest.mark.parametrize("kind", ENERGON)
def test_energon_folders(tmp_path, kind):
    fields, texts = ENERGON[kind]
    record = {"captions": ["one", "two"], "q": "Why?", "a": ["no", "since"], "w": [0.1, 0.9]}
    if kind == "CrudeWebdataset":
        record["conversations"] = TALK
    for name in ("shards/s_0.tar", "shards/s_1.tar", "shards/s_2.tar", "v.tar"):
        content = [("7.jpg", picture(0, kind="JPEG")), ("7.json", json.dumps(record).encode())]
        write_tar(tmp_path / "in" / name, content)
    meta = tmp_path / "in" / ".nv-meta"
    meta.mkdir()
    (meta / "dataset.yaml").write_text(
        f"sample_type:\n  __module__: megatron.energon\n  __class__: {kind}\n{fields}\nsubflavors: {{}}\n"
    )
    (meta / "split.yaml").write_text(
        "exclude: [shards/s_1.tar]\nsplit_parts:\n  train: ['shards/s_{0..2}.tar']\n  val: [v.tar]\n"
    )
    manifest, samples = built(tmp_path / "out", "webdataset", tmp_path / "in")
    assert [s["tar"].rsplit("/", 1)[1] for s in manifest["shards"]] == ["s_0.tar", "s_2.tar"]
    assert [t.text for t in samples[1].turns] == texts and samples[1].images == (picture(0, kind="JPEG"),)
    assert len(built(tmp_path / "val", "webdataset", tmp_path / "in", part="val")[1]) == 1
    with pytest.raises(DataError, match=r"no part 'test' .*known: train, val.*--split"):
        built(tmp_path / "test", "webdataset", tmp_path / "in", part="test")


@pytest.mark.parametrize(
    "dataset, split, message",
    [
        ("sample_type: {__class__: CaptioningSample}", "split_parts: {train: [a.tar]}", "lacks image, caption"),
        ("sample_type: {__class__: OtherSample}", "split_parts: {train: [a.tar]}", "class 'OtherSample' are not read"),
        ("{__class__: CrudeWebdataset, sample_loader: 'x.py:f'}", "split_parts: {train: [a.tar]}", "not run"),
        ("__class__: CrudeWebdataset", "split_parts: {train: [../a.tar]}", "leads out of the folder"),
        ("__class__: CrudeWebdataset", "split_parts: {train: []}", "has no shards"),
        ("__class__: CrudeWebdataset", "exclude: [a.tar/7]\nsplit_parts: {train: [a.tar]}", "single samples"),
        ("__class__: CrudeWebdataset", "[", "is not valid YAML"),
        ("- a", "split_parts: {train: [a.tar]}", "must be a mapping"),
        ("__class__: !!python/object/apply:os.system ['touch x']", "{}", "is not valid YAML"),
    ],
)
def test_bad_energon_metadata_is_named(tmp_path, dataset, split, message):
    meta = tmp_path / "in" / ".nv-meta"
    meta.mkdir(parents=True)
    (meta / "dataset.yaml").write_text(dataset)
    (meta / "split.yaml").write_text(split)
    with pytest.raises(DataError, match=message) as caught:
        built(tmp_path / "out", "webdataset", tmp_path / "in")
    assert ".yaml" in str(caught.value) and not (tmp_path / "out").exists()


def test_bad_samples_of_a_tar_are_named_or_left_out(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            *members(1),
            ("b.jpg", picture(0, kind="JPEG")[:300]),
            ("b.json", json.dumps({"conversations": TALK}).encode()),
            ("c.json", json.dumps({"conversations": TALK}).encode()),
            ("d.jpg", picture(0, kind="JPEG")),
            ("d.jpg", picture(1, kind="JPEG")),
            ("e.jpg", picture(0, kind="JPEG")),
            ("f.pickle", b"cos\nsystem\n(S'touch x'\ntR."),
            *[(f"z{name}", content) for name, content in members(1)],
        ],
    )
    with pytest.raises(DataError) as caught:
        built(tmp_path / "out", "webdataset", path)
    text = str(caught.value)
    for words in ("5 problems in 7 records", "b.jpg", "placeholders for 0 images", "two members of one name",
                  "no conversation", "sample f:",
                  "1  unreadable image", "1  placeholders"):  # fmt: skip
        assert words in text, words
    manifest, samples = built(tmp_path / "out", "webdataset", path, on_bad_sample="skip")
    assert [s.key for s in samples] == ["0000", "z0000"] and manifest["samples"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["record"], line["key"]) for line in lines] == list(enumerate("bcdef", 1))


def test_a_moved_tar_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", members(2))
    built(tmp_path / "out", "webdataset", path)
    path.rename(tmp_path / "b.tar")
    (problem,) = check_folder(tmp_path / "out")
    assert "is missing" in problem.message and "a.tar" in str(problem)


def test_records_of_tars_are_those_of_the_build(tmp_path):
    """Numbers go on from tar to tar; a tar that is damaged is one problem, and the next one is read."""
    for i in range(3):
        write_tar(tmp_path / "in" / f"{i}.tar", members(2 + i))
    (tmp_path / "in" / "1.tar").write_bytes(b"no tar at all" * 50)
    (source,) = open_sources("webdataset", [tmp_path / "in"])
    found = list(read_source(source))
    assert [number for number, _, _ in found] == [0, 1, 2, 2, 3, 4, 5]
    records = [record for _, _, record in found if isinstance(record, Record)]
    assert [record.number for record in records] == [0, 1, 0, 1, 2, 3]
    (problem,) = (record for _, _, record in found if isinstance(record, DataError))
    assert "damaged tar header" in problem.message and problem.shard == str(tmp_path / "in" / "1.tar")
    _, samples = built(tmp_path / "out", "webdataset", tmp_path / "in", on_bad_sample="skip")
    assert [(r.key, r.turns, r.images, r.names) for r in records] == [
        (s.key, s.turns, s.images, s.image_names) for s in samples
    ]
    assert found[0][1] == {"__key__": "0000", "conversations": TALK}


STRAYS = (
    [("._a.png", b"\0\5\26\7"), ("a.png", picture()), ("._a.json", b"\0\5\26\7"), ("a.json", "JSON")],
    [("README", b"x"), (".DS_Store", b"x"), ("a.png", picture()), ("a.json", "JSON"), ("__MACOSX/._a.json", b"x")],
    [("a.png", picture()), ("LICENSE", b"x"), ("a.json", "JSON"), ("README.md", b"x"), (".git/x.json", b"x")],
    [("./a.png", picture()), ("./._b.png", b"x"), ("./a.json", "JSON")],
)


@pytest.mark.parametrize("members", STRAYS)
def test_members_of_no_sample_are_skipped_and_counted(tmp_path, members, caplog):
    """As webdataset's own reader does: what macOS, desktops and people leave in archives."""
    talk = json.dumps({"conversations": TALK}).encode()
    path = write_tar(tmp_path / "a.tar", [(n, talk if c == "JSON" else c) for n, c in (*members, ("b.txt", b"B"))])
    with caplog.at_level("WARNING"):
        manifest, samples = built(tmp_path / "out", "webdataset", path)
    assert (manifest["samples"], manifest["images"]) == (2, 1)
    assert samples[0].images == (picture(),) and samples[0].turns[1].text == TALK[1]["value"]
    assert (
        samples[0].image_names == (next(n for n, c in members if c == picture()),) and samples[1].turns[1].text == "B"
    )
    (said,) = caplog.messages
    assert "members that belong to no sample and are not read" in said
    warnings = [found for found in check_sources(open_sources("webdataset", [path])) if isinstance(found, DataError)]
    assert [w.reason for w in warnings] == [Reason.SKIPPED_MEMBERS]
    import webdataset

    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    strays = ("README", "__MACOSX", ".git")
    assert [sample.key for sample in samples] == [key for key in theirs if not key.startswith(strays)]


@pytest.mark.parametrize(
    "head, message",
    [
        (gzip.compress(b"x" * 2000, mtime=0), "compressed with gzip: unpack it first"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>" + b" " * 600, "a web page"),
    ],
)
def test_what_is_no_tar_is_called_by_its_name(tmp_path, head, message):
    for name in ("a.tar", "a.tar.gz"):
        (tmp_path / name).write_bytes(head)
        with pytest.raises(DataError, match=f"{name}.*not a tar archive: {message}"):
            built(tmp_path / "out", "webdataset", tmp_path / name)


@pytest.mark.parametrize("kind", ["CaptioningWebdataset", "VQAWebdataset"])
def test_energon_data_sets_that_name_no_class_of_samples(tmp_path, kind):
    fields, texts = ENERGON[{"CaptioningWebdataset": "CaptioningSample", "VQAWebdataset": "VQASample"}[kind]]
    record = {"captions": ["one", "two"], "q": "Why?", "a": ["no", "since"], "w": [0.1, 0.9]}
    write_tar(tmp_path / "in" / "s.tar", [("7.jpg", picture(kind="JPEG")), ("7.json", json.dumps(record).encode())])
    meta = tmp_path / "in" / ".nv-meta"
    meta.mkdir()
    (meta / "dataset.yaml").write_text(f"__module__: megatron.energon\n__class__: {kind}\n{fields}\n")
    (meta / "split.yaml").write_text("split_parts:\n  train: [s.tar]\n  val: []\n")
    _, samples = built(tmp_path / "out", "webdataset", tmp_path / "in")
    assert [turn.text for turn in samples[0].turns] == texts
    with pytest.raises(
        DataError, match=r"samples of class 'X' are not read \(known: .*VQAWebdataset.*build the data set"
    ):
        (meta / "dataset.yaml").write_text("__class__: X\n")
        built(tmp_path / "no", "webdataset", tmp_path / "in")


def test_a_metadataset_is_named_with_what_to_do(tmp_path):
    blend = "    - {weight: 5, path: ./coco}\n    - {weight: 2, path: ./coyo}\n"
    (tmp_path / "m.yaml").write_text(f"__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n{blend}")
    with pytest.raises(
        DataError, match=r"metadataset .* one by one \(./coco ./coyo\).*data.train: \[\{path: ..., weight"
    ):
        built(tmp_path / "out", "webdataset", tmp_path / "m.yaml")


BOMBS = ("s_{0..99999999999}.tar", "{a,b}" * 60, "{" * 500 + "}" * 500, "{{a,b},{c,d}}" * 30, "{0..999999}{0..999999}",
         "s_{0..9999999999999999999999}.tar")  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_braces_are_counted_before_they_are_written_out(tmp_path, bomb):
    meta = tmp_path / "in" / ".nv-meta"
    meta.mkdir(parents=True)
    (meta / "dataset.yaml").write_text("__class__: CrudeWebdataset\n")
    (meta / "split.yaml").write_text(f"split_parts:\n  train: ['{bomb}']\n")
    with pytest.raises(
        DataError, match=r"more shards than 1,000,000|nested more than|is missing|leads out|no shards|characters, the"
    ):
        built(tmp_path / "out", "webdataset", tmp_path / "in")


def test_braces_count_as_they_are_written_out():
    from braceexpand import braceexpand

    simple = ("a", "{a,b}", "{a,b}{c,d,e}", "{0..9}", "{01..12..3}", "{9..0..-2}", "{a}", r"\{a,b\}")
    for pattern in (*simple, "x{a,{b,c}d}y", "{{1..3},z}"):
        assert count_braces(pattern) == len(list(braceexpand(pattern))), pattern
