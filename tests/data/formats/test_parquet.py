"""Parquet files and folders of HF ``datasets``: image bytes in columns, conversations in each of their shapes."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vlm.errors import DataError
from tests.data.formats.make import built, picture, records_of, write_pictures

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


def rows(number):
    return [
        {"id": f"r{i}", "image": {"bytes": picture(i), "path": "x.png"}, "conversations": TALK} for i in range(number)
    ]


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(values)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return path


def test_parquet_files(tmp_path):
    paths = [write(tmp_path / "in" / f"{i}.parquet", rows(3)) for i in range(2)]
    manifest, samples = built(tmp_path / "a", "parquet", tmp_path / "in")
    assert manifest["samples"] == 6 and [s.images for s in samples] == [(picture(i),) for i in (0, 1, 2)] * 2
    assert samples[0].turns[0].text == "<image>\nWhat?" and samples[0].image_names == ("#0",)
    assert built(tmp_path / "b", "parquet", str(tmp_path / "in" / "*.parquet"))[0]["samples"] == 6
    assert len(built(tmp_path / "c", "parquet", paths[1])[1]) == 3


def test_datasets_folder_and_the_other_columns(tmp_path):
    write_pictures(tmp_path, 1)
    talk = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Q?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
    ]
    folder = tmp_path / "saved"
    write(folder / "data-00000-of-00002.arrow", [{"messages": talk, "images": [{"bytes": picture(4), "path": None}]}])
    texts = [{"user": "Q1", "assistant": "A1", "source": "s"}, {"user": "Q2", "assistant": "A2", "source": "s"}]
    write(folder / "data-00001-of-00002.arrow", [{"texts": texts, "images": [{"bytes": None, "path": "0.png"}]}])
    names = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    _, samples = built(tmp_path / "out", "parquet", folder, root=str(tmp_path))
    assert [t.text for t in samples[0].turns] == ["<image>Q?", "A."] and samples[0].images == (picture(4),)
    assert [t.text for t in samples[1].turns] == ["<image>Q1", "A1", "Q2", "A2"]
    assert samples[1].images == (picture(0),)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p.mkdir(), "without parquet or arrow files"),
        (lambda p: None, "No such file"),
        (lambda p: p.write_bytes(b"PAR1 not really PAR1"), "cannot be read"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "dataset_dict.json").write_text("{}")), "not a readable dataset_dict"),
        (lambda p: (p.mkdir(), (p / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')), "lead out"),
        (lambda p: (p.mkdir(), (p / "state.json").write_text("{}")), "state.json"),
    ],
)
def test_bad_files_are_named(tmp_path, make, message):
    make(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message) as caught:
        records_of("parquet", tmp_path / "a.parquet")
    assert "a.parquet" in str(caught.value)


def test_rows_without_a_conversation_are_named(tmp_path):
    (found,) = records_of("parquet", write(tmp_path / "a.parquet", [{"text": "x", "label": 3}]))
    assert "no column conversations, messages, texts; found: text, label" in str(found)
