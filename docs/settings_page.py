"""Every setting, its default, its flags and what it does, out of the config classes' docstrings: a page of the site.

python docs/settings_page.py                     prints the page
mkdocs (mkdocs.yml names this file as a hook)    makes it settings.md
"""

import dataclasses
import re
import typing
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.options import aliases
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.training.run_config import RunConfig

PAGE = "settings.md"
_HEAD = """# All settings

Made from the classes that the settings are fields of. `section.key=value` on a command line, a line of a YAML file, or one of
the flags; hyphens equal underscores. [Configuration](configuration.md) says how they are laid over each other.
"""


def documented(config: type[Config]) -> dict[str, str]:
    """Field -> its text in the class's docstring, on one line."""
    found: dict[str, str] = {}
    _, _, text = (config.__doc__ or "").partition("Attributes:")
    for entry in re.split(r"\n {8}(?=\w)", "\n" + text.strip("\n")):
        names, sep, words = entry.strip().partition(":")
        for name in names.split(",") if sep else ():
            found[name.strip()] = " ".join(words.split())
    return found


def sections() -> dict[str, type[Config]]:
    """Section -> its class; those of a run, then ``launch``."""
    hints = typing.get_type_hints(RunConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(RunConfig)} | {"launch": LaunchConfig}


def flags() -> dict[str, list[str]]:
    """Setting -> the flags that set it."""
    found: dict[str, list[str]] = {}
    tables: list[dict[str, Any]] = [aliases.VALUES, aliases.LISTS, aliases.LAUNCH_VALUES, aliases.LAUNCH_LISTS]
    pairs = [pair for table in tables for pair in table.items()]
    pairs += [(flag, key) for table in (aliases.SWITCHES, aliases.LAUNCH_SWITCHES) for flag, (key, _) in table.items()]
    for flag, key in pairs:
        found.setdefault(key, []).append(f"`--{flag}`")
    return found


def page() -> str:
    """Returns the page."""
    parts, by_setting = [_HEAD], flags()
    for section, config in sections().items():
        words = documented(config)
        title = (config.__doc__ or "").splitlines()[0]
        parts += [
            f"\n## `{section}`\n\n{title}\n",
            "| setting | default | flags | what it does |",
            "| --- | --- | --- | --- |",
        ]
        for field in dataclasses.fields(config):
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            named = " ".join(dict.fromkeys(by_setting.get(f"{section}.{field.name}", [])))
            text = words.get(field.name, "").replace("``", "`").replace("|", "\\|")
            parts.append(f"| `{section}.{field.name}` | {default} | {named} | {text} |")
    return "\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: adds the page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


if __name__ == "__main__":
    print(page(), end="")
