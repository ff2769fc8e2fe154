"""Paths of a start: expanded once, wherever they come from."""

import typing
from pathlib import Path

import pytest

from megatron_vlm.config import PathText
from megatron_vlm.errors import ConfigError
from megatron_vlm.options.request import PATHS
from megatron_vlm.training.run_config import RunConfig
from tests.launch.commands import request_of


def test_every_path_of_a_run_is_expanded_before_it_is_used(monkeypatch):
    """The settings that launch reads before RunConfig does are all that are paths there."""

    def is_path(hint) -> bool:
        return hint in (PathText, Path) or any(is_path(part) for part in typing.get_args(hint))

    sections = typing.get_type_hints(RunConfig)
    found = {
        f"{section}.{name}"
        for section, kind in sections.items()
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
        if is_path(hint)
    }
    assert found == set(PATHS)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    words = "--load ~/m --data_path ~/d $DISK/e --output_dir ~/out --adapter $DISK/a --shard_cache ~/c data.valid=[~/v]"
    request = request_of(words)
    assert request.run["checkpoint"] == {"load": "/home/me/m", "save": "/home/me/out"}
    assert request.run["logging"]["output_dir"] == "/home/me/out" and request.run["peft"]["adapter"] == "/disk/a"
    assert request.run["data"]["valid"] == ["/home/me/v"]
    assert request.launch.data_path == ("/home/me/d", "/disk/e") and request.launch.shard_cache == "/home/me/c"
    file = {"checkpoint": {"save": "~/s"}, "data": {"train": [{"path": "$DISK/t", "weight": 1}]}, "logging": {}}
    train = request_of("--model_name_or_path ~/m", "train", file)
    assert train.run["checkpoint"] == {"save": "/home/me/s", "load": "/home/me/m"}
    assert train.run["data"]["train"] == [{"path": "/disk/t", "weight": 1}]
    with pytest.raises(ConfigError, match=r"launch.output_dir '\$NOWHERE/x': the environment variable NOWHERE"):
        request_of("--output_dir $NOWHERE/x")
