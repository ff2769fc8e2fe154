"""The recipes of long rows, in the small form that runs on two cores."""

import json

import pytest

from tests.examples.shell import free_port, start


@pytest.mark.full
def test_documents_and_videos_over_two_ranks(tmp_path):
    process = start("long_rows.sh", OUTPUT=tmp_path, STEPS=4, MASTER_PORT=free_port())
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-6000:]
    assert output.count("RoPE is scaled: yarn, factor 4; positions: 4096, before 1024") >= 2
    for name in ("documents", "video"):
        lines = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["loss"] < lines[0]["loss"] and (lines[-1]["images"] > 48) == (name == "video")
    assert output.count('"answer": ') == 2  # by one rank, of prompts beyond the 1,024 positions
