"""PEFT's rules of names: which modules a setting means. Names are of modules in memory, or have a naming's folders before them.

Written out, as the import of PEFT would cost every process seconds; tests hold them to PEFT's own functions.
Source: peft 0.21.2, tuners/tuners_utils.py (check_target_module_exists) and utils/other.py (get_pattern_key).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def last_name(module: str) -> str:
    """The last part of a module's name; a number takes the part before it along (``mlp1.1``)."""
    *parents, name = re.split(r"[./]", module)
    return f"{parents[-1]}.{name}" if name.isdecimal() and parents else name


def matches(module: str, wanted: str | Sequence[str] | None) -> bool:
    """Whether a list of names (whole ones, or what follows their last dots) or a regular expression means a module.

    Folders of a naming count as parents in lists.
    """
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    dotted = module.replace("/", ".")
    return any(dotted == name or dotted.endswith(f".{name}") for name in wanted or ())


def lies_under(tensor: str, name: str) -> bool:
    """A tensor belongs to a module called ``name``, or to one beneath it; one beside all modules is named itself."""
    return tensor == name or f".{name}." in f".{tensor.replace('/', '.')}"


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` means a module."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that means a module."""
    return next((value for key, value in (patterns or {}).items() if pattern_matches(key, module)), default)


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether adapter_config.json puts a pair on a module, which must not lie in one of ``modules_to_save``."""
    wanted, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not matches(module, wanted) or matches(module, config.get("exclude_modules")):
        return False
    if isinstance(wanted, str) or module in (wanted or ()) or layers is None or layers == []:
        return True
    given = config.get("layers_pattern")
    names = [given] if isinstance(given, str) and given else given or ()
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
    number = next((int(match[1]) for pattern in patterns if (match := re.match(pattern, module))), None)
    return number in ([layers] if isinstance(layers, int) else layers)
