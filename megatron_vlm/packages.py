"""Python packages that commands need: their names, the versions this release is made for, and how to have them."""

import re
from importlib import metadata

DISTRIBUTION = "megatron_vlm"
OWN_NAMES = {"pyyaml": "yaml", "pillow": "PIL", "megatron-core": "megatron.core"}
"""package -> what is imported, where that has another name"""


def pins() -> dict[str, tuple[str, str]]:
    """Package -> (version, extra) as this installation's metadata says; empty without metadata (a bare checkout)."""
    found: dict[str, tuple[str, str]] = {}
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return found
    for line in lines:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?==([^\s;]+)(?:.*extra == [\"'](\w+)[\"'])?", line)
        if match and (match[1] not in found or not match[3]):
            found[match[1]] = (match[2], match[3] or "")
    return found


def pip_line(name: str, pin: str | None) -> str:
    """The command that installs a package."""
    return f"pip install '{name}=={pin}'" if pin else f"pip install {name}"


def missing(module: str | None) -> str | None:
    """What to say of a module that cannot be imported; None: it is no package of others."""
    top = (module or "").split(".")[0]
    if not top or top == DISTRIBUTION:
        return None
    name = next((name for name, own in OWN_NAMES.items() if own.split(".")[0] == top), top)
    pin = next(
        (pin for package, (pin, _) in pins().items() if package.replace("-", "_").lower() == name.replace("-", "_")),
        None,
    )
    return (
        f"the package {name} is not installed: {pip_line(name, pin)}, or the whole environment by toolkits/setup_env.sh"
    )
