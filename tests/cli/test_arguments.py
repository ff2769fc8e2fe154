"""Arguments that several commands share."""

import argparse
from pathlib import Path

import pytest

from megatron_vlm.cli.arguments import add_path, add_verify_hashes
from megatron_vlm.errors import ConfigError


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    add_path(parser, "--out", "a folder")
    add_path(parser, "folders", "folders", nargs="*")
    add_verify_hashes(parser)
    return parser


def test_paths_are_expanded(parser, monkeypatch):
    monkeypatch.setenv("DISK", "/disk")
    args = parser.parse_args(["--out", "~/x", "$DISK/a", "b"])
    assert args.out == str(Path.home() / "x") and args.folders == ["/disk/a", "b"]


@pytest.mark.parametrize(
    ("words", "culprit"), [(["--out", ""], "--out"), (["a", ""], "DIR"), (["$NOT_SET_1/a"], "NOT_SET_1")]
)
def test_a_path_that_says_nothing_is_refused_by_name(parser, words, culprit):
    with pytest.raises(ConfigError, match=culprit):
        parser.parse_args(words)


def test_digests_are_compared_unless_said_otherwise(parser):
    assert parser.parse_args([]).verify_hashes is True
    assert parser.parse_args(["--no-verify-hashes"]).verify_hashes is False
