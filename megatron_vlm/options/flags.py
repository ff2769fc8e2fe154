"""Reads a command line of `megatron-vlm train` and `launch` with the table of ``aliases``.

    --lr 1e-4   optimizer.lr=1e-4   -->  ("optimizer.lr", "1e-4")  -->  request.read_request --> RunConfig
    --max_steps 10                  -->  ("--max_steps", "10")     -->  flag_values.FlagValues

Hyphens equal underscores. A recipe's flag that means nothing here is accepted with one line that says why; one that
asks for something that is not built is refused by name; an unknown one is an error that names the nearest.
"""

import dataclasses
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_vlm.config import parse_value
from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.options.aliases import (
    BATCH_FLAGS,
    FLAG_ALIASES,
    IGNORED,
    LAUNCH_LISTS,
    LAUNCH_SWITCHES,
    LAUNCH_VALUES,
    LISTS,
    OUTPUT_DIR,
    REFUSED,
    SWITCHES,
    TRANSLATED,
    VALUES,
)
from megatron_vlm.options.flag_values import FLAG, FlagValues
from megatron_vlm.yaml_values import spelling

FLAG_FIELDS = {item.name.replace("_", "-"): item.name for item in dataclasses.fields(FlagValues)} | FLAG_ALIASES
"""flag -> field of FlagValues"""

SAME_AS = {
    f"{FLAG}learning_rate": "optimizer.lr",
    f"{FLAG}lr_scheduler_type": "optimizer.lr_decay_style",
    f"{FLAG}warmup_ratio": "optimizer.lr_warmup_fraction",
    f"{FLAG}warmup_steps": "optimizer.lr_warmup_iters",
    f"{FLAG}max_steps": "training.train_iters",
    f"{FLAG}num_train_epochs": "training.train_epochs",
    f"{FLAG}eval_steps": "training.eval_interval",
    f"{FLAG}model_name_or_path": "checkpoint.load",
    f"{FLAG}save_steps": "checkpoint.save_interval",
    f"{FLAG}save_total_limit": "checkpoint.keep_last",
}
"""field of FlagValues -> the setting that it is another name of"""

_DIFFERS = {
    (
        "truncation-strategy",
        "right",
    ): "here whole turns are removed from the end, tokens only of an answer that stays too long"
}
"""(flag, its value) of ``TRANSLATED`` -> what is not quite the same here"""

Command = Literal["train", "launch"]


@dataclass
class ParsedFlags:
    """What a command line says: the config file, settings in order, and lines to print about flags without effect."""

    config: str | None = None
    settings: list[tuple[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_flags(argv: Sequence[str], command: Command = "train") -> ParsedFlags:
    """Reads `--config FILE`, `section.key=value` and flags, in order; a later one wins.

    Raises:
        ConfigError: unknown or refused flag, missing or surplus value, two flags that say different things of one setting.
    """
    parsed, words, said = ParsedFlags(), list(argv), dict[str, tuple[str, Any, Any]]()
    if names_config(words):
        parsed.config = words.pop(0)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            key, sep, value = word.partition("=")
            if not sep or "." not in key:
                raise ConfigError(f"cannot read argument {word!r}: expected --flag or section.key=value")
            parsed.settings.append((key.strip(), parse_value(value, key.strip())))
            continue
        name, sep, inline = word[2:].partition("=")
        flag = name.replace("_", "-")
        values = ([inline] if sep else []) + _take_values(words)
        if flag == "config":
            parsed.config = _one(word, values)
        elif flag in TRANSLATED and " ".join(values).lower() in TRANSLATED[flag]:
            meant = TRANSLATED[flag][value := " ".join(values).lower()]
            if meant:
                parsed.settings.append(_agreed(said, flag, *meant, as_written=value))
            if (flag, value) in _DIFFERS:
                parsed.notes.append(f"--{name} {value}: {_DIFFERS[flag, value]}")
        elif flag in TRANSLATED and not {flag} & {*VALUES, *LAUNCH_VALUES, *FLAG_FIELDS}:
            known = ", ".join(TRANSLATED[flag])
            raise ConfigError(f"--{name} {' '.join(values)}".rstrip() + f" is not built; known here: {known}")
        elif flag in REFUSED:
            accepted, message = REFUSED[flag]
            if not values or any(value not in accepted for value in values):
                raise ConfigError(f"--{name} {' '.join(values)}".rstrip() + f": {message}")
        elif flag in IGNORED:
            parsed.notes.append(f"--{name} has no effect here: {IGNORED[flag]}")
        else:
            parsed.settings.append(_agreed(said, flag, *_setting(flag, name, values, command)))
    return parsed


def _agreed(
    said: dict[str, tuple[str, Any, Any]], flag: str, key: str, value: Any, as_written: str | None = None
) -> tuple[str, Any]:
    """The setting, which no other flag in ``said`` contradicts."""
    of, written = SAME_AS.get(key, key), value if as_written is None else as_written
    before = said.get(of, (flag, value, written))
    if before[0] != flag and not _same(before[1], value):
        raise ConfigError(
            f"--{before[0]} {_text(before[2])} and --{flag} {_text(written)} say different things of {of}: leave one out"
        )
    said[of] = (flag, value, written)
    return key, value


def names_config(argv: Sequence[str]) -> bool:
    """Whether a command line begins with a config, as ``xtuner train CONFIG ...`` does."""
    return bool(argv) and not argv[0].startswith("-") and "=" not in argv[0]


def flat_flags(file: Mapping[str, Any]) -> list[str] | None:
    """The command line that a YAML of flags (LLaMA-Factory's, ms-swift's) stands for; None: it has sections, as ours do."""
    if not file or any(isinstance(value, Mapping) for value in file.values()):
        return None
    words = []
    for key, value in file.items():
        if value is not None:
            words += [f"--{key}", *(map(spelling, value) if isinstance(value, list) else [spelling(value)])]
    return words


def _setting(flag: str, name: str, values: list[str], command: Command) -> tuple[str, Any]:
    """The setting that a flag with these values makes."""
    if command == "launch":
        if VALUES.get(flag) == "logging.output_dir":
            return OUTPUT_DIR, _one(f"--{name}", values)
        if flag in LAUNCH_SWITCHES:
            return _switch(flag, values, LAUNCH_SWITCHES)
        if flag in LAUNCH_LISTS:
            key, folders = LAUNCH_LISTS[flag], _folders(_some(flag, values))
            weighted = any(isinstance(item, dict) for item in folders)
            return ("data.valid" if "eval" in key else "data.train") if weighted else key, folders
    elif flag in {**LAUNCH_LISTS, **LAUNCH_SWITCHES, **LAUNCH_VALUES}.keys() - LISTS.keys() - set(BATCH_FLAGS):
        raise ConfigError(
            f"--{name} belongs to `megatron-vlm launch`, which takes raw data and starts the processes; train reads folders "
            "that `megatron-vlm data build` wrote (--data-path)"
        )
    if flag in VALUES or flag in LAUNCH_VALUES:
        return VALUES.get(flag) or LAUNCH_VALUES[flag], _one(f"--{name}", values)
    if flag in LISTS:
        return LISTS[flag], _folders(_some(flag, values))
    if flag in SWITCHES:
        return _switch(flag, values, SWITCHES)
    if flag in FLAG_FIELDS:
        return _flag_value(flag, name, values)
    # A flag without effect is hardly what was meant.
    meant = [known for known in known_flags(command) if known not in IGNORED]
    raise ConfigError(f"unknown flag --{name}{nearest(flag, meant)}")


def known_flags(command: Command) -> list[str]:
    """Every flag that a command takes."""
    more = [*LAUNCH_LISTS, *LAUNCH_SWITCHES, *LAUNCH_VALUES] if command == "launch" else list(BATCH_FLAGS)
    return ["config", *VALUES, *LISTS, *SWITCHES, *FLAG_FIELDS, *TRANSLATED, *REFUSED, *IGNORED, *more]


def _flag_value(flag: str, name: str, values: list[str]) -> tuple[str, Any]:
    """A field of FlagValues: a list takes all values, a yes or no none or one."""
    item = FLAG_FIELDS[flag]
    hint = typing.get_type_hints(FlagValues)[item]
    if "tuple" in str(hint):
        return FLAG + item, _some(flag, values)
    if bool in typing.get_args(hint) and not values:
        return FLAG + item, True
    return FLAG + item, _one(f"--{name}", values)


def _switch(flag: str, values: list[str], table: dict[str, tuple[str, Any]]) -> tuple[str, Any]:
    key, value = table[flag]
    said = " ".join(values).lower()
    off = "none" if value in ("optimizer", "parameters") else (not value if isinstance(value, bool) else None)
    if said and (said not in ("true", "false") or off is None):
        raise ConfigError(f"--{flag} stands alone or says True or False, got {' '.join(values)!r}")
    return key, off if said == "false" else value


def flags_help(command: Command = "train") -> str:
    """The table as text."""
    values, lists, switches = dict(VALUES), dict(LISTS), dict(SWITCHES)
    if command == "launch":
        values |= LAUNCH_VALUES | {flag: OUTPUT_DIR for flag, key in VALUES.items() if key == "logging.output_dir"}
        lists |= LAUNCH_LISTS
        switches |= LAUNCH_SWITCHES
    else:
        values |= {flag: LAUNCH_VALUES[flag] for flag in BATCH_FLAGS}
    lines = ["flags (hyphens equal underscores) and the config keys they set:", ""]
    rows = [
        (
            "CONFIG, --config FILE",
            "YAML with the sections above, the name of a packaged recipe, or a config of XTuner's",
        ),
        ("--help", "this text"),
    ]
    rows += [(f"--{flag} VALUE", key) for flag, key in values.items()]
    rows += [(f"--{flag} DIR ...", key) for flag, key in lists.items()]
    rows += [(f"--{flag}", f"{key}={str(value).lower()}") for flag, (key, value) in switches.items()]
    lines += [f"  {left:<48} {right}" for left, right in rows]
    lines += ["", "of the original programs, with their meaning (docs/old-commands.md, docs/from-deepspeed.md):"]
    lines += [*_wrap(f"--{flag}" for flag in FLAG_FIELDS)]
    lines += ["", "accepted without effect, each with a line that says why:", *_wrap(f"--{flag}" for flag in IGNORED)]
    lines += ["", "refused by name where they ask for what is not built:", *_wrap(f"--{flag}" for flag in REFUSED)]
    return "\n".join(lines)


def _same(one: Any, other: Any) -> bool:
    return one == other or (not isinstance(one, list) and _number(str(one)) == _number(str(other)))


def _number(text: str) -> Any:
    """A flag's value to compare: 1e-4 and 0.0001 say the same."""
    return float(text) if _is_number(text) else text.lower()


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _some(flag: str, values: list[str]) -> list[str]:
    if not values:
        raise ConfigError(f"--{flag} needs at least one value")
    return _filled(f"--{flag}", values)


def _wrap(flags: Iterable[str]) -> list[str]:
    return textwrap.wrap(" ".join(flags), 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _take_values(words: list[str]) -> list[str]:
    """Removes and returns the words up to the next flag or ``section.key=value``; negative numbers are values."""
    values = []
    while words and not words[0].startswith("--") and not _is_override(words[0]):
        values.append(words.pop(0))
    return values


def _is_override(word: str) -> bool:
    key, sep, _ = word.partition("=")
    return bool(sep) and all(part.isidentifier() for part in key.split(".")) and "." in key


def _folders(values: list[str]) -> list[Any]:
    """Megatron's blends: ``0.3 A 0.7 B`` gives each folder a weight; folders alone stay as they are."""
    pairs = list(zip(values[::2], values[1::2]))
    if len(values) % 2 or not all(_is_number(weight) for weight, _ in pairs) or any(_is_number(p) for _, p in pairs):
        return list(values)
    return [{"path": path, "weight": float(weight)} for weight, path in pairs]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one(word: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ConfigError(f"{word.split('=')[0]} needs one value, got {' '.join(values) or 'none'}")
    return _filled(word, values)[0]


def _filled(word: str, values: list[str]) -> list[str]:
    """The values, none of them empty, as a variable of a shell that was never set leaves them."""
    if "" in values:
        raise ConfigError(f"{word.split('=')[0]} is given an empty value: name one, or leave it out")
    return values
