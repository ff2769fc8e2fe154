"""YAML as settings need it: what was written is never lost, nothing is read twice, and no file is too large to check.

    text --compose--> nodes, bounded, each key once --parse_yaml--> dict, list, scalars that know their text

``DATA=007`` reads as a number, and is the folder "007" all the same where a text is wanted: numbers and words such as
``yes`` keep their spelling (``spelling``), dates stay text. Config (config.py) then converts by the type of each field.
"""

import os
from typing import Any, Self

import yaml

from megatron_vlm.errors import ConfigError, MegatronVLMError
from megatron_vlm.files import describe, read_text

MAX_YAML_BYTES = 1 << 19
"""Of a YAML file; a resolved config has a few kilobytes."""
MAX_YAML_NODES = 100_000
"""Values of a document with every alias written out."""
_TRUE = ("yes", "on", "true")
_FALSE = ("no", "off", "false")


class Spelt:
    """A value of YAML that knows how it was written."""

    text: str

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class SpeltInt(Spelt, int):
    """An integer."""


class SpeltFloat(Spelt, float):
    """A number with a point."""


class SpeltBool(Spelt, str):
    """``yes``, ``True`` ...: any spelling but ``true`` and ``false``, which are Python's own."""

    def __bool__(self) -> bool:
        return self.lower() in _TRUE


def spelling(value: Any) -> str:
    """How a scalar of ``parse_yaml`` was written."""
    if isinstance(value, bool):
        return str(value).lower()
    return value.text if isinstance(value, Spelt) else str(value)


def as_bool(value: Any) -> bool | None:
    """What YAML 1.1 and the flags of the original programs call true or false; None: neither."""
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    return True if word in _TRUE else False if word in _FALSE else None


def plain(value: Any) -> Any:
    """The same in Python's own types."""
    if isinstance(value, SpeltBool):
        return bool(value)
    if isinstance(value, SpeltInt):
        return int(value)
    if isinstance(value, SpeltFloat):
        return float(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def read_yaml(path: str | os.PathLike, error: type[MegatronVLMError] = ConfigError) -> Any:
    """Reads a YAML file.

    Raises:
        MegatronVLMError: of class ``error``: no regular file of a sane size, or as ``parse_yaml``.
    """
    return parse_yaml(read_text(path, error, MAX_YAML_BYTES), describe(path), error)


def parse_yaml(text: str, what: str, error: type[MegatronVLMError] = ConfigError) -> Any:
    """Reads one YAML document with the safe tags alone.

    Raises:
        MegatronVLMError: of class ``error``, with ``what`` in front: no YAML, a key that stands twice in one mapping, aliases
            that grow without bound.
    """
    try:
        # Not libyaml's: it ends the process where brackets nest by the hundred thousand.
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, what, error)
            return _value(loader, node, what, error)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as caught:
        raise error(f"{what} is not valid YAML: {_problem(caught)}") from caught
    except RecursionError as caught:
        raise error(f"{what} is not valid YAML: nested too deeply") from caught


def _problem(caught: Exception) -> str:
    """One line about a syntax error, with its place."""
    mark = getattr(caught, "problem_mark", None)
    text = getattr(caught, "problem", None) or str(caught).splitlines()[0]
    return text if mark is None else f"{text}, in line {mark.line + 1}, column {mark.column + 1}"


def _count(node: Any, sizes: dict[int, int], what: str, error: type[MegatronVLMError]) -> int:
    """Values under a node, aliases written out."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise error(f"{what}: an alias inside its own anchor{_place(node)}")
        return sizes[id(node)]
    sizes[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        total += sum(_count(part, sizes, what, error) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(part, sizes, what, error) for part in node.value)
    if total > MAX_YAML_NODES:
        raise error(f"{what}: more than {MAX_YAML_NODES:,} values, aliases written out{_place(node)}")
    sizes[id(node)] = total
    return total


def _place(node: Any) -> str:
    return f", line {node.start_mark.line + 1}"


def _value(loader: Any, node: Any, what: str, error: type[MegatronVLMError], *, listed: bool = False) -> Any:
    """The value of a node; ``listed``: inside a list, whose items are never nothing."""
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node, what, error)
        loader.flatten_mapping(node)  # merges of << come first: what stands beside them wins
        pairs = ((loader.construct_object(key, deep=True), item) for key, item in node.value)
        return {_key(key, what, error): _value(loader, item, what, error) for key, item in pairs}
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(loader, item, what, error, listed=True) for item in node.value]
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
    if kind == "timestamp" or (kind == "null" and listed and text):
        return text
    value = loader.construct_object(node, deep=True)
    made: Any = value
    if kind == "int":
        made = SpeltInt(value)
    elif kind == "float":
        made = SpeltFloat(value)
    elif kind == "bool" and text not in ("true", "false"):
        made = SpeltBool(text)
    if isinstance(made, Spelt):
        made.text = text
    return made


def _key(key: Any, what: str, error: type[MegatronVLMError]) -> Any:
    if isinstance(key, list | dict | set):
        raise error(f"{what}: a key must be a word, got {key!r}")
    return key


def _refuse_twice(node: Any, what: str, error: type[MegatronVLMError]) -> None:
    first: dict[Any, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            line = key.start_mark.line + 1
            if key.value in first:
                raise error(
                    f"{what}: key {key.value!r} stands twice in one mapping, in lines {first[key.value]} and {line}: keep one"
                )
            first[key.value] = line
