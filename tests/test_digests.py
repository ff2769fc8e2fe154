"""One check of files against their digests, whatever file lists them."""

import json
import random

import pytest

from megatron_vlm.digests import LISTING, Hashing, Record, check_records, check_seal, listed, sealed, write_listing
from megatron_vlm.errors import CheckpointError, ConversionError
from megatron_vlm.files import file_digest
from megatron_vlm.testing.fuzz import flip_bit


@pytest.fixture
def record(tmp_path):
    """Five files of other sizes."""
    for number in range(5):
        (tmp_path / f"f{number}").write_bytes(bytes(range(10 * number, 20 * number + 1)))
    files = {path.name: file_digest(path) for path in tmp_path.iterdir()}
    return Record(folder=tmp_path, source="manifest.json", files=files, error=CheckpointError)


def test_what_was_written_passes_and_each_fault_is_named(record, tmp_path):
    record.check_sizes()
    check_records([record])
    path = tmp_path / "f3"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    record.check_sizes()
    with pytest.raises(CheckpointError, match=r"f3 was changed: its sha256 is not the one in manifest\.json"):
        check_records([record])
    path.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match=r"f3 has 30 bytes, manifest\.json says 31"):
        record.check_sizes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"f3 is missing: manifest\.json lists it"):
        record.check_sizes()
    with pytest.raises(CheckpointError, match="f3"):
        record.check_digests(["f3"])


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_shares_read_every_file_once(record, shares):
    read = []
    hashed = {name: lambda name=name: read.append(name) or record.files[name]["sha256"] for name in record.files}
    shared = Record(folder=record.folder, source="m", files=record.files, error=CheckpointError, hashed=hashed)
    for share in range(shares):
        shared.check_digests(share=share, shares=shares)
    assert sorted(read) == sorted(record.files)


@pytest.mark.parametrize(
    "files",
    [None, [], {"a": 1}, {"a": {"size": "1", "sha256": ""}}, {"a": {"size": 1}}, {"../a": {"size": 1, "sha256": ""}},
     {"/etc/passwd": {"size": 1, "sha256": ""}}],
)  # fmt: skip
def test_a_list_that_cannot_be_one_is_refused(tmp_path, files):
    with pytest.raises(ConversionError, match=r"manifest\.json is damaged"):
        Record(folder=tmp_path, source="manifest.json", files=files, error=ConversionError)


def test_a_listing_holds_the_files_beside_it(tmp_path):
    assert listed(tmp_path, ConversionError) == ()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b").write_text("b")
    (tmp_path / "a").write_text("a")
    write_listing(tmp_path)
    (found,) = listed(tmp_path, ConversionError)
    assert list(found.files) == ["a"]
    check_records([found])
    (tmp_path / "a").write_text("b")
    with pytest.raises(ConversionError, match=f"a was changed.*remove {LISTING}"):
        check_records(listed(tmp_path, ConversionError))


def test_a_changed_value_breaks_the_seal(tmp_path):
    path = tmp_path / "x.json"
    data = sealed({"a": [1, 2.5, None], "b": {"c": "é"}})
    check_seal(data, path, ConversionError)
    check_seal({"a": 1}, path, ConversionError, required=False)
    for wrong in ({**data, "a": [1, 2.5]}, {**data, "d": 1}, {"a": 1}, {**data, "digest": 5}):
        with pytest.raises(ConversionError, match=r"x\.json was changed"):
            check_seal(wrong, path, ConversionError)
    found, rng = 0, random.Random(0)
    for _ in range(100):
        path.write_text(json.dumps(data, ensure_ascii=False))
        flip_bit(path, rng)
        try:
            read = json.loads(path.read_bytes())
            check_seal(read, path, ConversionError)
            assert read == data
        except (ValueError, ConversionError):
            found += 1
    assert found >= 95


def test_a_thread_hashes_while_something_else_goes_on(record):
    with Hashing(record.folder, record.files, ConversionError) as hashing:
        assert hashing.result() == record.files
    with Hashing(record.folder, ["none"], ConversionError) as hashing, pytest.raises(ConversionError, match="none"):
        hashing.result()
