"""Base of all configs: frozen, keyword-only dataclasses read from YAML with dotted overrides.

    YAML text --load_yaml--> dict --apply_overrides--> dict --Config.from_dict--> frozen dataclass tree

An unknown key is an error that names the nearest known one; a value of a wrong type is an error that shows the value. A path
is a field of type Path or PathText: ``~`` and environment variables are expanded here, whoever wrote it, and nowhere else.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.files import expand_path, expand_text
from megatron_vlm.yaml_values import as_bool, parse_yaml, plain, read_yaml, spelling

_EXPANDED = "expanded"
PathText = Annotated[str, _EXPANDED]
"""A path, or where a setting takes one a hub id, as text."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class; subclasses document each field and check across fields in ``__post_init__``."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None, where: str = "") -> Self:
        """Builds the config from plain data; ``where`` is the dotted path used in errors.

        Raises:
            ConfigError: unknown key, wrong type or failed check, with the dotted path of the culprit.
        """
        if data is None:
            data = {}
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where or cls.__name__} must be a mapping, got {data!r}")
        hints = typing.get_type_hints(cls, include_extras=True)
        known = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for key, value in data.items():
            path = f"{where}.{key}" if where else str(key)
            if key not in known:
                raise ConfigError(f"unknown config key {path!r}{nearest(str(key), known)}")
            values[key] = _convert(hints[key], value, path)
        try:
            return cls(**values)
        except TypeError as error:
            missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in values]
            if not missing:
                raise ConfigError(f"{where or cls.__name__}: {error}") from error
            names = [f"{where}.{name}" if where else name for name in missing]
            raise ConfigError(
                f"missing {', '.join(names)}: set it as {names[0]}=VALUE, by its flag or in the config"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data that ``from_dict`` reads back."""
        return _plain(self)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Reads one YAML mapping, as ``yaml_values.read_yaml``; errors name the file."""
    data = read_yaml(path)
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold a mapping at the top, got {type(data).__name__}")
    return data or {}


def parse_value(text: str, what: str) -> Any:
    """Reads the value of ``section.key=value``, as YAML: none, true, numbers and lists can be written; empty is None."""
    return parse_yaml(text, f"{what}={text}") if text else None


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies ``a.b=value`` strings (values are YAML) to nested plain data, in order, and returns it."""
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise ConfigError(f"override {item!r} is not of the form section.key=value")
        set_dotted(data, key.strip(), parse_value(text, key.strip()))
    return data


def set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets ``data[a][b] = value`` for key ``a.b``, making mappings on the way."""
    *parents, last = key.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if child is None:
            child = data[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {key!r}: {parent!r} holds a value, not a section")
        data = child
    data[last] = value


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return plain(value)
    if origin is Annotated:
        text = _convert_scalar(str, value, path)
        return expand_text(text, path) if _EXPANDED in args else text
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is typing.Literal:
        if (value if value in args else spelling(value)) not in args:
            raise ConfigError(f"{path} must be one of {', '.join(map(str, args))}, got {value!r}")
        return value if value in args else spelling(value)
    if origin in (tuple, list):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        if origin is tuple and not (len(args) == 2 and args[1] is ...):
            if len(value) != len(args):
                raise ConfigError(f"{path} must be a list of {len(args)} values, got {value!r}")
            return tuple(_convert(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value)))
        return origin(_convert(args[0] if args else Any, item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, got {value!r}")
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_dict(value, path)
    return _convert_scalar(hint, value, path)


def _convert_union(args: Sequence[Any], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    args = [arg for arg in args if arg is not type(None)]
    if isinstance(value, str) and value[:1] == "[" and any(_form(arg) == "list" for arg in args):
        value = parse_value(value, path)  # a flag's text
    # What the value has the form of comes first: its error is the one to show.
    args.sort(key=lambda arg: _form(arg) != _form_of(value))
    errors = []
    for arg in args:
        try:
            return _convert(arg, value, path)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(errors[0])


def _form(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is dict or (isinstance(hint, type) and issubclass(hint, Config)):
        return "mapping"
    return "list" if origin in (tuple, list) else "scalar"


def _form_of(value: Any) -> str:
    if isinstance(value, Mapping | Config):
        return "mapping"
    return "scalar" if isinstance(value, str) or not isinstance(value, Sequence) else "list"


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    wrong = ConfigError(f"{path} must be {getattr(hint, '__name__', hint)}, got {value!r}")
    if hint is bool:
        meant = as_bool(value)
        if meant is None:
            raise wrong
        return meant
    if value is None:
        raise (
            ConfigError(f"{wrong} (a word that means nothing in YAML goes into quotes)")
            if hint in (str, Path)
            else wrong
        )
    if hint in (str, Path):
        if isinstance(value, list | tuple | Mapping):
            raise wrong
        return expand_path(spelling(value), path) if hint is Path else spelling(value)
    if isinstance(value, bool):
        raise wrong
    try:
        if hint is int:
            if int(value) != float(value):
                raise wrong
            return int(value)
        if hint is float:
            return float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong from error
    return value
