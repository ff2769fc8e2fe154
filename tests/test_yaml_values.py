"""YAML files that are no settings: each is an error that names the file, and none takes time."""

import os
import time

import pytest

from megatron_vlm.config import load_yaml
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.yaml_values import read_yaml

BOMB = "a0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optimizer:\n  lr: 1.0e-4\n  lr: 1.0e-3\n", "key 'lr' stands twice in one mapping, in lines 2 and 3"),
        ("data: {}\ntraining: {}\ndata: {}\n", "'data' stands twice"),
        (BOMB, "aliases written out"),
        ("a: &a [*a]\n", "an alias inside its own anchor"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "x" * 600_000, "limit for such a file"),
        ("!!python/object/apply:os.system [x]\n", "not valid YAML"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("a: b: c", "line 1"),
        ("- a\n", "must hold a mapping"),
    ],
    ids=["twice", "section", "bomb", "circle", "deep", "long", "tag", "key", "syntax", "list"],
)
def test_files_that_are_no_settings(text, named, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert time.monotonic() - start < 10


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, word in (("pipe.yaml", "pipe"), ("absent.yaml", "No such file"), (".", "folder")):
        with pytest.raises(ConfigError, match=word):
            load_yaml(tmp_path / name)
    (tmp_path / "a.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(DataError, match="twice"):
        read_yaml(tmp_path / "a.yaml", DataError)


def test_aliases_and_merges(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &b {x: 1, y: 2}\nother:\n  <<: *b\n  y: 3\nagain: *b\n")
    assert load_yaml(path) == {"base": {"x": 1, "y": 2}, "other": {"x": 1, "y": 3}, "again": {"x": 1, "y": 2}}
    path.write_text("# nothing\n")
    assert load_yaml(path) == {}
