"""The documentation as a site: every setting described; built strictly, with nothing to fetch from other servers."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings_page():
    """docs/settings_page.py as a module."""
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_is_described(settings_page):
    silent = [
        f"{section}.{field.name}"
        for section, config in settings_page.sections().items()
        for field in dataclasses.fields(config)
        if not settings_page.documented(config).get(field.name)
    ]
    assert not silent, f"say in the class's docstring, under Attributes, what these do: {silent}"
    page = settings_page.page()
    (line,) = [line for line in page.splitlines() if line.startswith("| `optimizer.lr` |")]
    assert "`--lr`" in line and "rate" in line
    assert "| `launch.meta_path` | `None` | `--meta-path` | InternVL's meta.json. |" in page


@pytest.mark.full
def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 25 and (tmp_path / "settings" / "index.html") in pages
    assert "从 XTuner 迁移" in (tmp_path / "zh" / "index.html").read_text()
    fetched = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//|<link[^>]*stylesheet[^>]*//|@import"
    )
    for page in pages:
        assert not fetched.search(page.read_text()), page
