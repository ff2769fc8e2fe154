"""The package as installed: entry point, versions, docker's pins, and the commands that the docs give."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_vlm import __version__
from megatron_vlm.cli.main import main

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def setup_list(key: str) -> dict[str, str]:
    """Returns {package: version} of a literal list in setup.py: INSTALL, or one of EXTRAS."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("INSTALL", "EXTRAS"):
            value = ast.literal_eval(node.value)
            value = {"INSTALL": value} if isinstance(value, list) else value
            if key in value:
                return dict(re.match(r"([\w.-]+)(?:\[\w+\])?==(.+)", item).groups() for item in value[key])
    raise KeyError(key)


def test_everything_is_pinned_and_installed():
    for package, version in {**setup_list("INSTALL"), **setup_list("dev")}.items():
        assert metadata.version(package).split("+")[0] == version, package


def test_constraints_agree_with_setup():
    lines = (ROOT / "toolkits" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = {**setup_list("INSTALL"), **setup_list("dev")}
    for package, version in wanted.items():
        assert constraints.get(package, version) == version, package
    assert "torch" not in constraints, "the build of torch is chosen by MEGATRON_VLM_TORCH"


def test_console_script():
    script = Path(sys.executable).parent / "megatron-vlm"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("train", "data", "convert"):
        assert command in done.stdout


def test_command_line_starts_quickly(tmp_path):
    """Help, recipes and a look at raw records load no framework: that costs seconds."""
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": talk}]))
    code = f"""
import sys
from megatron_vlm.cli.main import main
for words in ("--help", "recipe list", "recipe show lora_idefics2", "completion bash", "completion words -- data preview --",
              "train --help", "launch --help", "data check {tmp_path}/a.json"):
    assert main(words.split()) == 0, words
    loaded = [name for name in ("torch", "megatron", "transformers", "tokenizers", "matplotlib") if name in sys.modules]
    assert not loaded, (words, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 sound samples, 0 problems" in done.stdout


def test_the_module_is_the_command():
    """`python -m megatron_vlm` and the script call the same function."""
    assert metadata.entry_points(group="console_scripts")["megatron-vlm"].load() is main
    done = subprocess.run([sys.executable, "-m", "megatron_vlm", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda p: p.name)
def test_docker_pins_equal_setup(dockerfile):
    """Every version that a Dockerfile pins of a package is setup.py's; the CPU one leaves them all to setup.py."""
    wanted = {**setup_list("INSTALL"), **setup_list("gpu"), **setup_list("dev")}
    text = dockerfile.read_text(encoding="utf-8")
    args = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    pins = {package: args[arg] for package, arg in re.findall(r"([\w-]+)(?:\[\w+\])?==\$\{(\w+)\}", text)}
    if dockerfile.name == "Dockerfile.gpu":
        assert {"torch", "megatron-core", "flash-attn", "transformer-engine"} <= set(pins)
        assert "github.com/NVIDIA/apex" in text and not re.search(r"pip install[^\n]* apex\b", text)
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+-\S+$", text, re.MULTILINE), "the base image is not pinned"
    assert {package: wanted[package] for package in pins} == pins
    assert not re.findall(r"[\w-]+==\d\S*", text), "pin through ARG, so that this test sees it"


def doc_commands() -> list[tuple[str, str]]:
    """(page, command line) of every line in a fenced sh block of the docs, continuation lines joined."""
    commands = []
    for page in DOCS:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    commands.append((page.name, line.strip()))
    return commands


def table_commands() -> list[tuple[str, str]]:
    """(page, command) of what tables of the pages about other programs tell to type here."""
    pages = [ROOT / "docs" / "coming-from.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]
    rows = [(page, line) for page in pages for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return [
        (page.name, text)
        for page, line in rows
        for text in re.findall(r"`((?:megatron-vlm|toolkits/\w+) [^`]+)`", line)
    ]


@pytest.mark.parametrize(("page", "command"), [*doc_commands(), *table_commands()], ids=lambda value: value[:60])
def test_documented_commands_exist(page, command):
    """Files named in a command exist, and megatron-vlm and convert know the flags that are given to them."""
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    for word in words:
        if re.match(r"(examples|toolkits|tests|benchmarks|docker)/", word):
            assert (ROOT / word).exists(), f"{page}: {command}: no {word}"
    tool = next((i for i, word in enumerate(words) if word in ("megatron-vlm", "toolkits/convert")), None)
    if tool is None:
        return
    program = ["megatron-vlm"] if words[tool] == "megatron-vlm" else [words[tool]]
    names = [word for word in words[tool + 1 :] if not word.startswith("-")]
    depth = 2 if names[0] in ("data", "convert", "recipe") else 1
    usage = help_text(*program, *names[:depth])
    for flag in (word.split("=")[0] for word in words[tool + 1 :] if word.startswith("--")):
        if names[0] in ("launch", "train"):  # hyphens equal underscores there
            flag, usage = flag.replace("_", "-"), usage.replace("_", "-")
        assert flag in (*re.findall(r"--[\w-]+", usage), "--help"), (
            f"{page}: {command}: {flag} is not in {' '.join(program + names[:depth])} --help"
        )


_help: dict[tuple[str, ...], str] = {}


def help_text(*words: str) -> str:
    """Returns what a command prints for --help."""
    if words not in _help:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [*words, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, done.stderr
        _help[words] = done.stdout
    return _help[words]


def test_settings_are_read_without_what_they_drive():
    """Flags and configs come to their errors without the seconds that megatron-core and torch take to load."""
    code = """
import sys
import megatron_vlm.registry, megatron_vlm.options.request, megatron_vlm.parallel.grid
assert "torch" not in sys.modules, "torch"
import megatron_vlm.training.run_config, megatron_vlm.models.options, megatron_vlm.models.family_config
import megatron_vlm.launch.launch, megatron_vlm.conversion.convert, megatron_vlm.conversion.verify
assert not any(name.split(".")[0] == "megatron" for name in sys.modules), "megatron"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
