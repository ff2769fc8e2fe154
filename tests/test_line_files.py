"""Lines that a disk refuses wait, in their order, and are written once it takes them again."""

import logging

from megatron_vlm.line_files import LineFile, json_lines


def test_lines_wait_for_a_place_and_it_is_told_once(tmp_path, caplog):
    path = tmp_path / "folder" / "lines.txt"
    path.parent.write_text("a file where the folder should be")
    file = LineFile(path)
    with caplog.at_level(logging.WARNING, "megatron_vlm"):
        file.add("one")
        file.add("two")
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == [f"{path} cannot be written"]
        path.parent.unlink()
        file.add("three")
    assert path.read_text() == "one\ntwo\nthree\n"
    assert [record.getMessage() for record in caplog.records][1:] == [f"{path} is written again"]


def test_what_waits_is_bounded_and_the_loss_is_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(LineFile, "_MOST_WAITING", 8)
    path = tmp_path / "folder" / "lines.txt"
    path.parent.write_text("a file where the folder should be")
    file = LineFile(path)
    with caplog.at_level(logging.WARNING, "megatron_vlm"):
        for line in ("one", "two", "six"):
            file.add(line)
        path.parent.unlink()
        file.add("ten")
    assert path.read_text() == "six\nten\n"
    assert caplog.records[-1].getMessage() == f"{path} is written again, but 2 lines were lost"


def test_two_writers_add_to_one_file_and_a_closed_one_opens_again(tmp_path):
    mine, other = LineFile(tmp_path / "lines.txt"), LineFile(tmp_path / "lines.txt")
    mine.add("one")
    other.add("two")
    mine.close()
    mine.close()
    mine.add("half a character: \ud800")
    assert (tmp_path / "lines.txt").read_text() == "one\ntwo\nhalf a character: \\ud800\n"


def test_lines_are_read_back(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n[2]\n{"a": 3}\n{"a": \xff')
    assert json_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 3}] and json_lines(tmp_path / "no") == []
