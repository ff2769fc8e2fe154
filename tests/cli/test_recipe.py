"""`megatron-vlm recipe`: list, show and copy, from a checkout and from what a wheel holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.cli import recipe
from megatron_vlm.errors import ConfigError
from megatron_vlm.options import recipes, xtuner

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples").rglob("*.yaml"))


def test_list_names_every_file_and_what_it_is_for(capsys):
    assert recipe.run(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(
        str(path.relative_to(ROOT / "examples").with_suffix("")) for path in FILES
    )
    assert all(len(line.split()) > 3 for line in lines), "a recipe starts with a comment that says what it is for"


def test_list_by_pattern(capsys):
    for pattern, names in (
        ("QLORA", {name for name in (*recipes.names(), *xtuner.NAMES) if "qlora" in name}),
        ("internvl3/*", {name for name in recipes.names() if name.startswith("internvl3/")}),
        ("quickstart", {name for name in recipes.names() if "quickstart" in name}),
    ):
        assert recipe.run(["list", "-p", pattern]) == 0 and names
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == names
    assert recipe.run(["list", "-p", "nothing so called"]) == 1
    assert "no recipe has 'nothing so called' in its name" in capsys.readouterr().err


def test_show_and_copy(capsys, tmp_path):
    source = ROOT / "examples" / "internvl3" / "lora_internvl3.yaml"
    for name in ("internvl3/lora_internvl3", "lora_internvl3", "lora_internvl3.yaml"):
        assert recipe.run(["show", name]) == 0
        assert capsys.readouterr().out == source.read_text()
    assert recipe.run(["copy", "lora_internvl3", str(tmp_path / "new" / "folder")]) == 0
    copied = tmp_path / "new" / "folder" / "lora_internvl3.yaml"
    assert capsys.readouterr().out.strip() == str(copied) and copied.read_text() == source.read_text()
    with pytest.raises(ConfigError, match="exists already"):
        recipe.run(["copy", "lora_internvl3", str(copied.parent)])
    with pytest.raises(ConfigError, match=r"cannot write .*lora_internvl3\.yaml/lora_internvl3\.yaml: "):
        recipe.run(["copy", "lora_internvl3", str(copied)])


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown recipe 'lora_internvl' .did you mean 'internvl3/lora_internvl3'"):
        recipe.run(["show", "lora_internvl"])


def test_config_takes_a_recipes_name_too(tmp_path):
    assert recipes.load_config("internvl3/lora_internvl3")["peft"]["r"] == 32
    (tmp_path / "mine").write_text("data: {seq_length: 8}")
    assert recipes.load_config(str(tmp_path / "mine")) == {"data": {"seq_length": 8}}
    with pytest.raises(ConfigError, match=r"cannot read nowhere.yaml: No such file"):
        recipes.load_config("nowhere.yaml")


def test_a_wheel_holds_them(tmp_path):
    """What goes into a wheel, away from the checkout: the same names, the same text."""
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code = "from megatron_vlm.options import recipes; print(recipes.root()); print(*recipes.names(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    folder, *names = done.stdout.split()
    assert Path(folder) == tmp_path / "megatron_vlm" / "examples" and names == recipes.names()
    assert all((Path(folder) / path.relative_to(ROOT / "examples")).read_bytes() == path.read_bytes() for path in FILES)
