"""Reading HF's config.json: what is not built is refused by name, whatever the family, and so are numbers that cannot be.

config.json --check_numbers--> --family's config class--> model config --check_parts-->       (FamilySpec.read_config)
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from megatron_vlm.errors import ConfigError

_COUNT, _WIDTH, _ROWS, _SIDE = 10_000, 1_000_000, 100_000_000, 8_192
_LARGEST = {
    "num_hidden_layers": _COUNT, "num_attention_heads": _COUNT, "num_key_value_heads": _COUNT, "resampler_depth": _COUNT,
    "resampler_n_heads": _COUNT, "resampler_n_latents": _COUNT, "num_channels": 64, "plora_rank": _COUNT,
    "hidden_size": _WIDTH, "intermediate_size": _WIDTH, "head_dim": _WIDTH, "resampler_head_dim": _WIDTH,
    "vocab_size": _ROWS, "max_position_embeddings": _ROWS, "max_length": _ROWS, "sliding_window": _ROWS,
    "image_size": _SIDE, "patch_size": _SIDE, "img_size": _SIDE, "force_image_size": _SIDE, "min_dynamic_patch": _COUNT,
    "max_dynamic_patch": _COUNT, "min_patches": _COUNT, "max_patches": _COUNT, "image_seq_len": _ROWS, "image_seq_length": _ROWS,
    "depth": _COUNT, "num_heads": _COUNT, "in_channels": 64, "spatial_merge_size": 64, "temporal_patch_size": 64,
    "merge_size": 64, "window_size": _SIDE, "out_hidden_size": _WIDTH, "min_pixels": _ROWS, "max_pixels": _ROWS,
    "height": _SIDE, "width": _SIDE, "shortest_edge": _SIDE, "longest_edge": _SIDE,
}  # fmt: skip
"""Keys of whole numbers from 1 on, with a bound far beyond any model: what is larger would be allocated, or counted up to."""
_ABOVE_ZERO = {
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "initializer_range", "downsample_ratio",
    "rescale_factor",
}  # fmt: skip
_AREAS = {"shortest_edge": _ROWS, "longest_edge": _ROWS}
"""The same of a processor that joins patches (``merge_size``): its edges are numbers of pixels."""
_CHANNELS = {"image_mean": -math.inf, "image_std": 0.0}
"""Lists of a number for each of three channels, above this."""
_SIDES = ("size", "crop_size")
_FILTERS = range(6)
_SECTIONS = (
    "text_config", "vision_config", "llm_config", "perceiver_config", "rope_parameters", "rope_scaling", "auto_map",
    "language_model_source", "image_processor",
)  # fmt: skip


def require(name: str, value: Any, wanted: Any, family: str = "") -> None:
    """Checks that a setting has the one value that is built (for ``family``).

    Raises:
        ConfigError: it has another.
    """
    if value != wanted:
        raise ConfigError(f"{name} {value!r} is not built{family and f' for {family}'}: only {wanted!r} is")


def check_numbers(
    config: Mapping[str, Any], where: str = "", largest: Mapping[str, int] = MappingProxyType(_LARGEST)
) -> None:
    """Checks the numbers of a config.json, or of a processor's files, that sizes are made from, in all its sections.

    ``largest``: keys of whole numbers, and their bounds.

    Raises:
        ConfigError: no number, or one that no model has.
    """
    for key, value in config.items():
        name = f"{where}{key}"
        if key in largest:
            for item in _items(value):
                if isinstance(item, bool) or not isinstance(item, int) or not 1 <= item <= largest[key]:
                    raise ConfigError(
                        f"{name} is {_shown(value)}, where a whole number from 1 to {largest[key]:,} must stand"
                    )
        elif key in _ABOVE_ZERO and value is not None:
            if not _is_number(value) or value <= 0:
                raise ConfigError(f"{name} is {_shown(value)}, where a number above 0 must stand")
        elif key in _CHANNELS and value is not None:
            low = _CHANNELS[key]
            if not isinstance(value, list) or len(value) != 3 or not all(_is_number(v) and low < v for v in value):
                raise ConfigError(
                    f"{name} is {_shown(value)}, where a list of 3 numbers must stand, one for each channel"
                )
        elif key == "resample" and value is not None:
            if isinstance(value, bool) or value not in _FILTERS:
                raise ConfigError(
                    f"{name} is {_shown(value)}, where the number of one of Pillow's filters must stand (0 to 5)"
                )
        elif key in _SIDES and value is not None:
            bounds = _LARGEST | (_AREAS if "merge_size" in config else {})
            check_numbers(value if isinstance(value, dict) else {"height": value}, f"{name}.", bounds)
        elif key in _SECTIONS and value is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{name} is {_shown(value)}, where a JSON object must stand")
            check_numbers(value, f"{name}.")


def check_parts(config: Any) -> None:
    """Checks that every part of a model config has its numbers.

    Raises:
        ConfigError: one is none, or an image is smaller than a patch.
    """
    for part in ("text", "vision", "perceiver"):
        _check_part(getattr(config, part, None), part)


def _check_part(config: Any, part: str) -> None:
    for field in dataclasses.fields(config) if config is not None else ():
        value = getattr(config, field.name)
        if field.type in (int, float) and (
            value is None or isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise ConfigError(f"{field.name} of the {part} model is {_shown(value)}, where a number must stand")
    if getattr(config, "image_size", 1) < getattr(config, "patch_size", 1):
        raise ConfigError(f"image_size {config.image_size} is below patch_size {config.patch_size}")


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of config.json; empty where there is none, or something else in its place."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _items(value: Any) -> Iterator[Any]:
    """The value, or those of a pair (InternVL writes sides as pairs); none of null, which leaves the choice to the family."""
    if value is not None:
        yield from value if isinstance(value, list) and len(value) == 2 else [value]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
