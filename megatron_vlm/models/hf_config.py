"""Reading HF's config.json: what is not built is refused by name, whatever the family."""

from typing import Any

from megatron_vlm.errors import ConfigError


def require(name: str, value: Any, wanted: Any, family: str = "") -> None:
    """Checks that a setting has the one value that is built (for ``family``).

    Raises:
        ConfigError: it has another.
    """
    if value != wanted:
        raise ConfigError(f"{name} {value!r} is not built{family and f' for {family}'}: only {wanted!r} is")
