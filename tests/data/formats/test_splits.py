"""Splits of a folder or glob: a test split never becomes training data, and what is not read is said."""

import json
from pathlib import PurePath

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.cli.data import run
from megatron_vlm.data.formats import expand_inputs, open_sources
from megatron_vlm.data.formats.splits import HELD_OUT, split_of
from megatron_vlm.errors import DataError
from tests.data.formats.make import built, write_json, write_tar

NAMES = {  # path -> its split
    "train-00000-of-00002.parquet": "train", "validation-00000-of-00001.parquet": "validation", "test-0.parquet": "test",
    "data/dev.jsonl": "validation", "val/a.tar": "validation", "valid_0.json": "validation", "eval.json": "validation",
    "testing/x.json": "test", "Train/x.json": "train", "test/train_0.json": "train", "coco2017-train/test/a.tar": "test",
    "pretrain.json": None, "latest.json": None, "contest.json": None, "evaluate_me.json": None, "0001.parquet": None,
}  # fmt: skip


def talk(text):
    return [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": text}]


def parquet(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist([{"conversations": talk(name)}])
        pyarrow.parquet.write_table(table, folder / name)
    return folder


def answers(samples):
    return [sample.turns[-1].text for sample in samples]


def test_words_of_names():
    assert {name: split_of(PurePath(name)) for name in NAMES} == NAMES


CLONE = ("data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
         "data/validation-00000-of-00001.parquet")  # fmt: skip


def test_a_cloned_folder_gives_its_training_split(tmp_path, caplog, capsys):
    folder = parquet(tmp_path / "clone", *CLONE)
    with caplog.at_level("WARNING"):
        assert answers(built(tmp_path / "a", "parquet", folder)[1]) == [*CLONE[1:3]]
    (said,) = caplog.messages
    assert "train is read (2 files), not test (1 file), validation (1 file)" in said and "--split validation" in said
    assert answers(built(tmp_path / "b", "parquet", folder, part="dev")[1]) == [CLONE[3]]
    assert sorted(answers(built(tmp_path / "c", "parquet", folder, part="all")[1])) == sorted(CLONE)
    assert answers(built(tmp_path / "held", "parquet", folder, part=HELD_OUT)[1]) == [
        CLONE[3]
    ]  # what an evaluation takes
    with pytest.raises(DataError, match=r"no files of split 'holdout'; found: test .*: choose with --split"):
        built(tmp_path / "d", "parquet", folder, part="holdout")
    words = ["build", "--format", "parquet", "--input", str(folder), "--split", "test", "--out", str(tmp_path / "e")]
    assert run(words) == 0 and "1 samples" in capsys.readouterr().out
    assert run(["check", str(folder), "--format", "parquet"]) == 0
    assert "2 sound samples" in capsys.readouterr().out


def test_globs_of_every_format_are_told_apart_too(tmp_path):
    for split in ("train", "test"):
        for number in range(2):
            record = {"conversations": talk(f"{split}{number}")}
            write_json(tmp_path / "json" / f"{split}-{number}.jsonl", [record])
            members = [("a.json", json.dumps(record).encode())]
            write_tar(tmp_path / "tars" / split / f"{number}.tar", members)
    wanted = ["train0", "train1"]
    assert answers(built(tmp_path / "a", "llava", str(tmp_path / "json" / "*.jsonl"))[1]) == wanted
    assert answers(built(tmp_path / "b", "webdataset", tmp_path / "tars")[1]) == wanted
    assert answers(built(tmp_path / "c", "webdataset", str(tmp_path / "tars" / "**" / "*.tar"))[1]) == wanted
    (tmp_path / "tars" / "more.tar").write_bytes((tmp_path / "tars" / "train" / "0.tar").read_bytes())
    assert len(built(tmp_path / "d", "webdataset", tmp_path / "tars")[1]) == 3  # of no split: for training
    only = tmp_path / "tars" / "test"  # a folder that was named is what was meant
    assert answers(built(tmp_path / "e", "webdataset", only)[1]) == ["test0", "test1"]


def test_a_folder_of_one_split_is_what_was_meant(tmp_path, caplog):
    folder = parquet(tmp_path / "in", "validation-0.parquet", "validation-1.parquet")
    with caplog.at_level("WARNING"):
        assert len(built(tmp_path / "a", "parquet", folder)[1]) == 2
    assert "all of it is split validation" in caplog.text


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: parts/a-*
  - split: test
    path: ["parts/b-*", "parts/c-*"]
---
# A data set
"""


def test_the_card_says_which_files_are_which(tmp_path):
    folder = parquet(
        tmp_path / "in", "parts/a-0.parquet", "parts/b-0.parquet", "parts/c-0.parquet", "parts/d-0.parquet"
    )
    (folder / "README.md").write_text(CARD)
    assert answers(built(tmp_path / "a", "parquet", folder)[1]) == ["parts/a-0.parquet"]
    assert len(built(tmp_path / "b", "parquet", folder, part="test")[1]) == 2
    several = CARD.replace("config_name: default", "config_name: x").replace(
        "---\n# A", "- config_name: y\n  data_files: parts/d-*\n---\n# A"
    )
    (folder / "README.md").write_text(several)
    with pytest.raises(DataError, match=r"has 2 configurations \(x, y\): give the folder or the files of one"):
        built(tmp_path / "c", "parquet", folder)
    (folder / "README.md").write_text(CARD.replace("parts/a-*", "../secret/*"))
    with pytest.raises(DataError, match="leads out of the folder"):
        built(tmp_path / "d", "parquet", folder)
    odd = ("---\nconfigs: [\n---\n", "---\nconfigs: 3\n---\n", "no front", "---\nconfigs:\n- data_files: no/*\n---\n")
    for number, text in enumerate(odd):
        (folder / "README.md").write_text(text)
        assert len(built(tmp_path / f"odd{number}", "parquet", folder)[1]) == 4  # by names, which say nothing


def test_an_evaluation_never_falls_back_to_training_files(tmp_path):
    folder = parquet(tmp_path / "in", "train-0.parquet", "train-1.parquet")
    with pytest.raises(DataError, match=r"no files of split 'validation'; found: train \(2 files\)"):
        built(tmp_path / "a", "parquet", folder, part=HELD_OUT)
    folder = parquet(tmp_path / "plain", "0.parquet")
    assert len(built(tmp_path / "b", "parquet", folder, part=HELD_OUT)[1]) == 1


def test_folders_that_datasets_saved(tmp_path):
    parquet(tmp_path / "in", "train/0.parquet", "validation/0.parquet")
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert answers(built(tmp_path / "a", "parquet", tmp_path / "in")[1]) == ["train/0.parquet"]
    assert answers(built(tmp_path / "b", "parquet", tmp_path / "in", part="val")[1]) == ["validation/0.parquet"]
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["../x"]}')
    with pytest.raises(DataError, match="not a readable dataset_dict"):
        built(tmp_path / "c", "parquet", tmp_path / "in")


def test_globs_neither_follow_links_to_folders_nor_see_hidden_files(tmp_path):
    write_json(tmp_path / "in" / "a.json", [])
    write_json(tmp_path / "in" / ".b.json", [])
    for name in ("x", "y", "z"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "in", target_is_directory=True)  # 3 ** 40 ways
    assert expand_inputs([str(tmp_path / "in" / "**" / "*.json")]) == [str(tmp_path / "in" / "a.json")]
    assert len(open_sources("llava", [str(tmp_path / "*" / "a.json")])) == 1
