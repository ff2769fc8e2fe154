"""Config: values keep the spelling that a text wants, paths are expanded where they are read."""

import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_vlm.config import Config, PathText, apply_overrides, load_yaml
from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Values(Config):
    text: str = ""
    path: PathText | None = None
    file: Path | None = None
    folders: tuple[PathText, ...] = ()
    whole: int = 0
    number: float = 0.0
    switch: bool = False
    anything: typing.Any = None


def read(*overrides: str) -> Values:
    return Values.from_dict(apply_overrides({}, [f"x.{item}" for item in overrides])["x"], "x")


@pytest.mark.parametrize(
    "text", ["007", "1e3", "1.50", "yes", "No", "true", "True", "2024-01-02", "0x1F", "1_000", "1:30", "off", "0o7"]
)
def test_a_text_stays_as_it_is_written(text, tmp_path):
    """`DATA=007` names the folder 007, from a command line and from a file."""
    values = read(f"text={text}", f"path={text}", f"file={text}", f"folders=[{text}, null]")
    assert (values.text, values.path, values.file, values.folders) == (text, text, Path(text), (text, "null"))
    (tmp_path / "a.yaml").write_text(f"text: {text}\nfolders: [{text}]\n")
    values = Values.from_dict(load_yaml(tmp_path / "a.yaml"))
    assert (values.text, values.folders) == (text, (text,))


def test_numbers_and_switches_are_read_by_their_field():
    values = read("whole=007", "number=1e3", "switch=on", "anything=[1, 2.5, yes, {a: No}]", "path=null")
    assert (values.whole, values.number, values.switch, values.path) == (7, 1000.0, True, None)
    assert values.anything == [1, 2.5, True, {"a": False}]
    assert [type(item) for item in values.anything[:3]] == [int, float, bool]
    assert read("switch=No").switch is False


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    values = read("path=~/m", "file=$DISK/x", "folders=[~/a, '${DISK}/b', ./c]", "text=~/t")
    assert (values.path, values.file) == ("/home/me/m", Path("/disk/x"))
    assert values.folders == ("/home/me/a", "/disk/b", "./c")
    assert values.text == "~/t"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("path=$NO_SUCH_ONE/x", ["x.path", "NO_SUCH_ONE is not set"]),
        ("folders=[a, $NO_SUCH_ONE]", ["x.folders[1]", "NO_SUCH_ONE"]),
        ("whole=.inf", ["x.whole must be int"]),
        ("text=null", ["x.text must be str", "quotes"]),
        ("text=[1]", ["x.text must be str"]),
        ("switch=5", ["x.switch must be bool"]),
        ("text=[", ["x.text=[ is not valid YAML"]),
    ],
)
def test_errors_name_the_setting(override, named, monkeypatch):
    monkeypatch.delenv("NO_SUCH_ONE", raising=False)
    with pytest.raises(ConfigError) as caught:
        read(override)
    assert all(word in str(caught.value) for word in named), caught.value
    assert "\n" not in str(caught.value)


def test_a_list_written_in_a_flag():
    """A flag gives text: ``--decoder-layers-per-stage [1,3]`` and ``auto`` are both values of one setting."""
    given = {"pipeline_model_parallel_size": 2, "decoder_layers_per_stage": "[1, 3]"}
    assert ParallelConfig.from_dict(given).decoder_layers_per_stage == (1, 3)
    assert ParallelConfig.from_dict({**given, "decoder_layers_per_stage": "auto"}).decoder_layers_per_stage == "auto"
