"""Tokenizer and processor files of an HF folder, read alike by the families' processors."""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.text import sentencepiece
from megatron_vlm.data.text.chat import plain_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_json, write_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.hf_config import check_numbers

GENERATION, VIDEOS = "generation_config.json", "video_preprocessor_config.json"
PIXELS = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "video_total_pixels")
"""Fields of DataConfig that bound the size of images and of frames: the processor's files have them, too."""
IMAGE_SETTINGS = (
    "max_image_num", "image_size", "shortest_edge", "image_splitting", "dynamic_image_size", "min_dynamic_patch",
    "max_dynamic_patch", "use_thumbnail", "hd_num", *PIXELS,
)  # fmt: skip
"""Fields of DataConfig that say how images are seen; each family uses some of them."""
ALIASES = {"[UNUSED_TOKEN_146]": "<|im_start|>", "[UNUSED_TOKEN_145]": "<|im_end|>"}
"""Names that InternLM2's chat models give to tokens that its base models leave unused."""
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}  # where tokenizer_config.json does not say
_MAX_ID = 1 << 31


def processor_settings(hf_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns settings of the processor and of its image processor, which older folders keep in a file of its own.

    Raises:
        ConfigError: a file that cannot be read, or a number in it that no processor has.
    """
    processor, images = hf_dir / "processor_config.json", hf_dir / "preprocessor_config.json"
    settings = read_json(processor) if processor.is_file() or not images.is_file() else {}
    try:
        check_numbers(settings)
        if settings.get("image_processor"):
            return settings, settings["image_processor"]
        if not images.is_file():
            return settings, {}
        processor, settings_of_images = images, read_json(images)
        check_numbers(settings_of_images)
    except ConfigError as error:
        raise ConfigError(f"{processor}: {error}") from error
    return settings, settings_of_images


def video_processor_settings(hf_dir: Path) -> dict[str, Any]:
    """Returns the settings of the video processor, from where transformers reads them: those of images where there are none.

    Raises:
        ConfigError: as ``processor_settings``.
    """
    settings, images = processor_settings(hf_dir)
    file, nested = hf_dir / VIDEOS, settings.get("video_processor")
    if nested is not None or not file.is_file():
        return images if nested is None else nested
    try:
        found = read_json(file)
        check_numbers(found)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return found


def special_tokens(hf_dir: Path) -> dict[str, str | None]:
    """Returns bos_token (None where the tokenizer puts none before a text), eos_token and pad_token by name."""
    settings, found = _tokenizer_settings(hf_dir), {}
    for name, default in _SPECIAL.items():
        value = settings.get(name, default)
        found[name] = value.get("content") if isinstance(value, dict) else value
    return found if settings.get("add_bos_token", True) else {**found, "bos_token": None}


def fast_tokenizer(text: str, special: Mapping[str, str | None], added: Sequence[str] = (), **options: Any) -> Any:
    """A tokenizer of transformers that puts BOS, where ``special`` has one, before a text.

    Args:
        text: of a FastTokenizer.
        special: as of ``special_tokens``; what the vocabulary lacks is left out.
        added: special tokens to add.
        options: of transformers' class.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(text)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    names = {name: token for name, token in special.items() if token and backend.token_to_id(token) is not None}
    if bos := names.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    if backend.token_to_id("<unk>") is not None:
        names["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **options)


def _tokenizer_settings(hf_dir: Path) -> dict[str, Any]:
    path = hf_dir / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def load_tokenizer(hf_dir: Path, **options: Any) -> Any:
    """Loads the tokenizer as transformers does, with ``options`` of its own; no code of the folder is run.

    One of the folder's own code (InternLM2's) is made from its SentencePiece file, with BOS before a text unless it says not.

    Raises:
        ConfigError: there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    own_code = "auto_map" in _tokenizer_settings(hf_dir) and not (hf_dir / "tokenizer.json").is_file()
    if own_code and (hf_dir / "tokenizer.model").is_file():
        return fast_tokenizer(sentencepiece.load_tokenizer(hf_dir, ALIASES).text, special_tokens(hf_dir), **options)
    with tempfile.TemporaryDirectory(prefix="megatron_vlm_") as folder:
        # transformers would offer to run the model's code that config.json names, which the tokenizer has no need of.
        for path in hf_dir.iterdir():
            if path.name != "config.json" or "auto_map" not in read_json(path):
                (Path(folder) / path.name).symlink_to(path.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        except Exception as error:  # tokenizers raises plain Exception, transformers whatever its code runs into
            message = " ".join(str(error).replace(folder, str(hf_dir)).split())[:500]
            raise ConfigError(
                f"cannot load the tokenizer of {hf_dir}: {message or type(error).__name__}; compare its files with those the "
                "model was published with"
            ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {hf_dir} has no tokenizer.json, which exact loss masks need: save it as a fast one"
        )
    doubled = [index for index, count in Counter(tokenizer.get_vocab().values()).items() if count > 1]
    if doubled:  # which of them a text gets would be left to chance
        names = sorted(name for name, index in tokenizer.get_vocab().items() if index == doubled[0])
        raise ConfigError(
            f"the tokenizer of {hf_dir} gives id {doubled[0]} to {len(names)} tokens: {', '.join(names[:5])}"
        )
    return tokenizer


def token_ids(hf_dir: Path, find: Callable[[str], int | None], needed: Sequence[str], family: str) -> dict[str, int]:
    """Returns the ids of tokens that a family's prompts need; ``find`` gives the id of one, or None.

    Raises:
        ConfigError: the vocabulary lacks some.
    """
    found = {token: index for token in needed if (index := find(token)) is not None}
    missing = [token for token in needed if token not in found]
    if missing:
        raise ConfigError(f"the tokenizer of {hf_dir} lacks {', '.join(missing)}: is it {family}'s?")
    return found


def tokenizer_fields(
    hf_dir: Path, tokenizer: Any, image_token_id: int, configured: int | None, vocab_size: int, steering: Sequence[str]
) -> dict[str, Any]:
    """Fields of a processor from a tokenizer of transformers, of which the backend alone is kept.

    Args:
        hf_dir: it is of.
        tokenizer: of transformers.
        image_token_id: its id of the token that holds the place of image features.
        configured: the same by config.json; None: it does not say.
        vocab_size: of the model.
        steering: tokens that the prompt is made of.

    Raises:
        ConfigError: the two differ.
    """
    if configured not in (None, image_token_id):
        raise ConfigError(f"{hf_dir}: config.json has image_token_id {configured}, the tokenizer {image_token_id}")
    fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return {
        "tokenizer": plain_tokenizer(tokenizer.backend_tokenizer).steered_by(steering),
        "image_token_id": image_token_id,
        "filler_token_id": next(i for i in fillers if i is not None and i < vocab_size),
    }


def generation_stops(hf_dir: Path, *ends: int | None) -> tuple[int, ...]:
    """Returns the ids that end an answer: ``ends``, and the eos ids of generation_config.json.

    Raises:
        ConfigError: they are no ids.
    """
    path = hf_dir / GENERATION
    listed = read_json(path).get("eos_token_id") if path.is_file() else None
    listed = listed if isinstance(listed, list) else [listed]
    for index in listed:
        if index is not None and (isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < _MAX_ID):
            raise ConfigError(f"{path}: eos_token_id is {str(index)[:60]!r}, where ids of tokens must stand")
    return tuple(sorted({i for i in (*ends, *listed) if i is not None}))


def add_stops(directory: Path, ends: Iterable[int]) -> None:
    """Sees that transformers ends an answer of the model in ``directory`` at each of ``ends``, as training taught it.

    What generation_config.json has is kept and ``eos_token_id`` extended. Where there is no such file, what transformers would
    derive from config.json in its place is written with it; nothing, where that has all of them already.
    """
    path = directory / GENERATION
    content = read_json(path) if path.is_file() else _derived_generation(read_json(directory / "config.json"))
    listed = content.get("eos_token_id")
    known = listed if isinstance(listed, list) else [] if listed is None else [listed]
    missing = [end for end in ends if end not in known]
    if missing:
        write_json(path, {**content, "eos_token_id": [*known, *missing]})


def set_pixels(directory: Path, bounds: Mapping[str, int]) -> None:
    """Has the processors of the model in ``directory`` keep to the bounds it was trained with, of those named by ``PIXELS``.

    Frames of videos keep theirs, where transformers would take those of images for them: they get a file of their own.
    """
    if not bounds:
        return
    images = {name: bounds[name] for name in PIXELS[:2] if name in bounds}
    frames = {name: bounds[f"video_{name}"] for name in PIXELS[:2] if f"video_{name}" in bounds}
    processor, file = directory / "processor_config.json", directory / VIDEOS
    videos = video_processor_settings(directory)
    if total := bounds.get("video_total_pixels"):
        frames |= _cap(videos, total)
    content = read_json(processor) if processor.is_file() else {}
    if frames and content.get("video_processor") is not None:
        _bound(content["video_processor"], frames)
    elif frames or (images and videos and not file.is_file() and content.get("video_processor") is None):
        _bound(videos, frames)
        write_json(file, videos)
    if images and content.get("image_processor"):
        _bound(content["image_processor"], images)
    if content:
        write_json(processor, content)  # what none of this concerns is as it was
    path = directory / "preprocessor_config.json"
    content = read_json(path) if path.is_file() else {}
    if images and content:
        _bound(content, images)
        write_json(path, content)


def _bound(settings: dict[str, Any], bounds: Mapping[str, Any]) -> None:
    """Sets them, in the edges of ``size`` too where it has these."""
    settings.update(bounds)
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if name in bounds and edge in (settings.get("size") or {}):
            settings["size"][edge] = bounds[name]


def _cap(videos: Mapping[str, Any], total: int) -> dict[str, Any]:
    """``Qwen2VLVideoProcessor``'s settings of a limit of all frames, which it counts in tokens of 0.9 blocks."""
    block = (videos.get("patch_size", 14) * videos.get("merge_size", 2)) ** 2
    tokens = math.ceil(total / (block * 0.9))
    if int(tokens * block * 0.9) > total:
        tokens -= 1
    if (kept := int(tokens * block * 0.9)) != total:
        message = (
            "%d video_total_pixels of training are no number of tokens: transformers keeps to %d by max_video_tokens %d"
        )
        get_logger(__name__).warning(message, total, kept, tokens)
    return {"cap_pixels_per_frame": True, "max_video_tokens": tokens}


def _derived_generation(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers takes from config.json for generation: settings of the model, and of its decoder where it has none."""
    from transformers import GenerationConfig

    names = set(GenerationConfig().to_dict()) - {"transformers_version", "_from_model_config"}
    values = {**(config.get("text_config") or {}), **config}
    return {name: values[name] for name in sorted(names) if values.get(name) is not None}


def check_image_settings(config: DataConfig, family: str, *used: str) -> None:
    """Refuses settings of images that a family has no use for: none is ignored in silence.

    Raises:
        ConfigError: one that is not among ``used`` is set.
    """
    for name in IMAGE_SETTINGS:
        if name not in used and getattr(config, name) is not None:
            raise ConfigError(f"data.{name} {getattr(config, name)!r} has no effect on {family}: leave it out")
