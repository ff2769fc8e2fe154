"""toolkits/download_model.sh against a small hub on localhost."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.examples.shell import environment
from tests.toolkits.hub import Hub

SCRIPT = Path(__file__).parents[2] / "toolkits" / "download_model.sh"
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
FILES = {
    "config.json": b"{}",
    "model-1.safetensors": b"x" * 1000,
    "model-2.safetensors": b"y" * 24_000_000,  # more than the library writes at a time
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "pytorch_model.bin": b"the same in another form",
}


@pytest.fixture
def download(tmp_path):
    """``download(files, *arguments, breaks)``: (finished process, what the hub sent, folder)."""
    hubs = []

    def run(files, *arguments, breaks=()):
        if not hubs:
            hubs.append(Hub(files))
        hub = hubs[0]
        hub.sent.clear()
        hub.breaks = set(breaks)
        env = environment(HF_ENDPOINT=hub.url, HF_HOME=tmp_path / "home", HF_HUB_DISABLE_XET=1, HF_HUB_OFFLINE=0)
        words = ["sh", str(SCRIPT), "me/model", str(tmp_path / "model"), *arguments]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
        return done, list(hub.sent), tmp_path / "model"

    yield run
    for hub in hubs:
        hub.close()


def test_a_broken_connection_goes_on_and_nothing_is_fetched_twice(download):
    done, sent, folder = download(FILES, breaks={"model-2.safetensors"})
    assert done.returncode == 0, done.stderr
    wanted = {name: body for name, body in FILES.items() if name != "pytorch_model.bin"}
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == wanted
    starts = [first for name, first in sent if name == "model-2.safetensors"]
    assert len(starts) == 2 and starts[0] == 0 < starts[1], "the second answer starts where the first one broke off"
    done, sent, _ = download(FILES)
    assert done.returncode == 0 and not sent
    assert f"me/model -> {folder}" in done.stdout


def test_what_is_wrong_is_named(download):
    files = {name: body for name, body in FILES.items() if name != "model-2.safetensors"}
    done, _, _ = download(files)
    assert done.returncode == 1
    assert "the index names files that the hub does not have: model-2.safetensors" in done.stderr
    done, _, folder = download(files, "--include", "*.json")
    assert done.returncode == 0 and not (folder / "pytorch_model.bin").exists()
