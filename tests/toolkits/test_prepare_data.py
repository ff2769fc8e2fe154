"""toolkits/prepare_data.sh: raw records to checked shards, once."""

import json
import subprocess
from pathlib import Path

from megatron_vlm.testing.runs import write_shards
from tests.examples.shell import environment

SCRIPT = Path(__file__).parents[2] / "toolkits" / "prepare_data.sh"


def prepare(*words, **variables):
    done = subprocess.run(
        ["sh", str(SCRIPT), *map(str, words)], env=environment(**variables), capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_records_become_checked_shards_once(tmp_path):
    raw = write_shards(tmp_path / "raw", 4, seed=1).parent
    code, said = prepare("llava", raw / "records.json", tmp_path / "out", raw / "images", "--samples-per-shard", 2)
    assert code == 0, said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["samples"] == 4 and len(manifest["shards"]) == 2
    code, said = prepare("llava", raw / "records.json", tmp_path / "out", raw / "images")
    assert code == 0 and "holds shards already; REBUILD=1 makes them anew" in said
    code, said = prepare("llava")
    assert code == 1 and "FORMAT INPUT OUT" in said
