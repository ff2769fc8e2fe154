"""Room for what a run writes, and whether it can write."""

import shutil
from collections import namedtuple

from megatron_vlm.launch import disk
from megatron_vlm.launch.checks import Report

Usage = namedtuple("Usage", "total used free")


def test_folders_of_one_disk_share_its_room(tmp_path, monkeypatch):
    needs = {tmp_path / "new" / "out": {"2 checkpoints": 600 << 20}, tmp_path / "cache": {"shards": 300 << 20}}
    for free, failures in ((965 << 20, 0), (963 << 20, 1)):  # 900 MiB, and 64 for what is small
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        report = Report()
        disk.check_disk(report, needs)
        assert len(report.failed) == failures
        (finding,) = report.findings
        assert "2 checkpoints 0.63 GB, shards 0.31 GB" in finding.text and f"{tmp_path}: 1.01 GB needed" in finding.text


def test_a_folder_that_cannot_be_written_is_told_with_its_settings(tmp_path):
    (tmp_path / "file").touch()
    report = Report()
    there = tmp_path / "file" / "out"
    disk.check_outputs(report, {"logging.output_dir": there, "checkpoint.save": there, "launch.shard_cache": tmp_path})
    (finding,) = report.failed
    assert "logging.output_dir, checkpoint.save" in finding.text and str(there) in finding.text
    report = Report()
    disk.check_outputs(report, {"logging.output_dir": tmp_path, "checkpoint.save": tmp_path})
    assert not report.failed and report.findings[-1].text == str(tmp_path)
