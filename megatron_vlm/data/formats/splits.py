"""Splits of a data set that lies in several files: told apart by its card and by names, so that no test becomes training data.

    a folder, or the matches of a glob --README.md (configs: data_files), else words in file and folder names--> split -> files
    default: train, and what belongs to no split                     --split NAME: that one; all: every file

Words are those of Hugging Face's ``datasets`` (train-00000-of-00002, validation/, dev, test ...).
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from megatron_vlm.errors import DataError
from megatron_vlm.files import read_text
from megatron_vlm.yaml_values import parse_yaml, plain

TRAIN, ALL, HELD_OUT = "train", "all", "held out"  # the last: validation, where there are splits at all
WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
CARD = "README.md"
_CARD_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Files of a split, in order, and what to say of the others; empty: there are none."""

    files: tuple[Path, ...]
    note: str = ""


def canonical(word: str) -> str:
    """Returns the split that a word means (``dev``: validation); another word comes back as it is."""
    return next((split for split, words in WORDS.items() if word.lower() in words), word)


def split_of(path: PurePath) -> str | None:
    """Returns the split that a path within its data set names, the file's name before its folders'; None: none."""
    for name in (path.name, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", name.lower()):
            if any(word in words for words in WORDS.values()):
                return canonical(word)
    return None


def choose(files: Sequence[Path], base: Path, part: str, what: str) -> Choice:
    """Chooses among the files of a data set.

    Args:
        files: all of them, in order.
        base: the folder that their names are told from, or the beginning of a glob.
        part: split by any of its words, ``ALL`` or ``HELD_OUT``; empty: train.
        what: the input, for messages.

    Raises:
        DataError: no file is of the split.
    """
    groups: dict[str | None, list[Path]] = {}
    for file in files:
        groups.setdefault(split_of(Path(os.path.relpath(file, base))), []).append(file)
    return _chosen(groups, part, what, unnamed=groups.pop(None, []), order=files)


def choose_in(folder: Path, suffixes: Sequence[str], part: str) -> Choice:
    """Chooses among the files of a folder with one of the suffixes, the first that any file has; by the card, else by names.

    Raises:
        DataError: no file is of the split, or a card with several configurations.
    """
    files: list[Path] = []
    if not os.path.isdir(folder):
        return Choice(files=())
    for suffix in suffixes:
        files = files or sorted(folder.rglob(f"*{suffix}"))
    if not files or part == ALL:
        return Choice(files=tuple(files))
    card = _card(folder, files)
    if card:
        return _chosen(card, part, str(folder), unnamed=[], order=files)
    return choose(files, folder, part, str(folder))


def choose_name(names: Sequence[str], part: str, what: str) -> str:
    """Chooses among splits that lie in folders of their own, as ``datasets.save_to_disk`` writes them."""
    groups: dict[str | None, list[Path]] = {}
    for name in names:
        groups.setdefault(canonical(name), []).append(Path(name))
    return str(_chosen(groups, part, what, unnamed=[], order=[Path(name) for name in names]).files[0])


def _chosen(
    groups: dict[str | None, list[Path]], part: str, what: str, *, unnamed: list[Path], order: Sequence[Path]
) -> Choice:
    wanted = "validation" if part == HELD_OUT else canonical(part or TRAIN)
    if part == ALL or (not groups and part in ("", HELD_OUT)):
        return Choice(files=tuple(order))
    others = {str(name): files for name, files in groups.items() if name != wanted}
    told = ", ".join(
        f"{name} ({len(files)} {'file' if len(files) == 1 else 'files'})" for name, files in others.items()
    )
    if wanted not in groups and part in ("", HELD_OUT) and len(others) == 1 and not unnamed and TRAIN not in others:
        (name,) = others
        return Choice(files=tuple(others[name]), note=f"{what}: all of it is split {name}, which is read")
    taken = {*groups.get(wanted, []), *(unnamed if wanted == TRAIN else [])}
    if not taken:
        raise DataError(f"no files of split {wanted!r}; found: {told or 'no split'}: choose with --split", shard=what)
    note = ""
    if others:
        note = f"{what}: of its splits {wanted} is read ({len(taken)} {'file' if len(taken) == 1 else 'files'}), not {told}"
        name = "validation" if "validation" in others else next(iter(others))
        if part != HELD_OUT:
            note += f"; --split {name} reads that one, for a folder of its own; --split all reads every file"
    return Choice(files=tuple(file for file in order if file in taken), note=note)


def _card(folder: Path, files: Sequence[Path]) -> dict[str | None, list[Path]]:
    """split -> files by the ``configs`` of a dataset card; empty: it has none, or they match none of the files."""
    configs = _configs(folder / CARD) if os.path.isfile(folder / CARD) else []
    if not configs:
        return {}
    chosen = [c for c in configs if len(configs) == 1 or c.get("default") is True or c.get("config_name") == "default"]
    known, groups = set(files), dict[str | None, list[Path]]()
    for split, pattern in _patterns(chosen[0]["data_files"]) if chosen else ():
        if not pattern or PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts:
            raise DataError(f"data_files {pattern!r} leads out of the folder", shard=str(folder / CARD))
        group = groups.setdefault(canonical(split), [])
        group += [file for file in sorted(folder.glob(pattern)) if file in known and file not in group]
    if not chosen and any(
        file in known for c in configs for _, p in _patterns(c["data_files"]) for file in folder.glob(p)
    ):
        names = ", ".join(str(config.get("config_name")) for config in configs[:20])
        message = f"has {len(configs)} configurations ({names}): give the folder or the files of one of them"
        raise DataError(message, shard=str(folder / CARD))
    return {split: group for split, group in groups.items() if group}


def _configs(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path, DataError, _CARD_BYTES).removeprefix("\ufeff").split("\n")
    if lines[0].strip() != "---":
        return []
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), len(lines))
    try:
        data = plain(parse_yaml("\n".join(lines[1:end]), str(path), DataError))
    except DataError:
        return []  # names have to do: a card is for readers, and its top may hold anything
    configs = data.get("configs") if isinstance(data, dict) else None
    return (
        [c for c in configs or [] if isinstance(c, dict) and c.get("data_files")] if isinstance(configs, list) else []
    )


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Yields (split, pattern) of ``data_files``: a pattern, a list of them, or of {split, path: pattern or list}."""
    for item in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (item.get("split"), item.get("path")) if isinstance(item, dict) else (TRAIN, item)
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(split, str) and isinstance(path, str):
                yield split, path.removeprefix("./")
