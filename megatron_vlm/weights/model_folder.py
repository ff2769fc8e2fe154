"""Folders that hold a model: what may lie in them, and the files beside the weights that go where the model goes.

    folder --check_model_folder--> regular files and folders alone, no link that leads to somebody else's files
           --hf_files--> config, tokenizer, processor, licence ... --copy_hf_files | CarriedFiles--> exports, checkpoints

A model folder may come from anywhere. A pipe in it would hang whoever reads it, a link to a folder above it would be copied
without end, and a link to a file elsewhere would carry that file into every export.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConversionError
from megatron_vlm.files import describe, open_regular, read_bytes

WEIGHT_PATTERNS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf",
    "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.pkl",
)  # fmt: skip
"""Files that hold weights: never copied as "the other files" of a model."""
_SKIPPED_DIRECTORIES = {".git", ".cache", "__pycache__", "original", "onnx"}
_MODEL_FILES = (
    "*.json", "*.jinja", "*.model", "*.py", "*.txt", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*", "README*",
)  # fmt: skip
"""Files that may be links to a file of the same name elsewhere, as users make them who keep one copy of a tokenizer."""
_CONFIG = Path("config.json")
_PARTS = ("config.json", "adapter_config.json")
_MAX_DEPTH, _MAX_ENTRIES = 12, 100_000
_MAX_FILE_BYTES, _MAX_CARRIED_BYTES = 4 << 30, 2 << 30


def check_model_folder(directory: Path) -> None:
    """Refuses a folder with anything in it that cannot be read to its end, or that belongs to somebody else.

    Raises:
        ConversionError: a pipe, socket or device, a link in a circle or to nothing, a link that leads out of the folder (weights,
            files of a model under their own name, and the links of the hub's cache are let through), or a folder without end.
    """
    for _ in _walk(Path(directory)):
        pass


def hf_files(directory: Path) -> list[Path]:
    """Paths, relative to ``directory``, of every file of a model that holds no weights; version control and caches are left out.

    Raises:
        ConversionError: as ``check_model_folder``.
    """
    return [path for path in _walk(Path(directory)) if not is_weights(path.name)]


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)


def copy_hf_files(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Copies every file of an HF directory that holds no weights (config, tokenizer, processor, licence ...).

    Symbolic links are followed; version control and cache folders stay behind.

    Raises:
        ConversionError: as ``check_model_folder``; ``destination`` lies in ``source``; or the disk refuses.
    """
    source, destination = Path(source), Path(destination)
    if destination.resolve().is_relative_to(source.resolve()):
        raise ConversionError(
            f"{destination} lies in {source}, whose files would be copied there: choose another folder"
        )
    for path in hf_files(source):
        try:
            (destination / path).parent.mkdir(parents=True, exist_ok=True)
            with open_regular(source / path, ConversionError) as file, (destination / path).open("wb") as copy:
                _check_size(source / path, os.fstat(file.fileno()).st_size, _MAX_FILE_BYTES)
                shutil.copyfileobj(file, copy, 1 << 20)
        except OSError as error:
            raise ConversionError(
                f"cannot copy {describe(source / path)} to {describe(destination / path)}: {error.strerror or error}"
            ) from error


class CarriedFiles:
    """The same files in memory: what a run's checkpoints carry, although the folder may vanish while it goes on.

    Args:
        source: the folder.
        hf_config: what config.json is to say, where that is not what it says there.

    Raises:
        ConversionError: as ``copy_hf_files``, or they are too large to be kept.
    """

    def __init__(self, source: Path, hf_config: Mapping[str, Any] | None = None):
        self._files: dict[Path, bytes] = {}
        total = 0
        for path in hf_files(source):
            self._files[path] = read_bytes(source / path, ConversionError, _MAX_CARRIED_BYTES)
            total += len(self._files[path])
            _check_size(source, total, _MAX_CARRIED_BYTES)
        if hf_config is not None and json.loads(self._files[_CONFIG]) != hf_config:
            self._files[_CONFIG] = (json.dumps(hf_config, indent=2, ensure_ascii=False) + "\n").encode()

    def write(self, destination: Path) -> None:
        """Writes them all.

        Raises:
            OSError: the disk refuses.
        """
        for path, data in self._files.items():
            (destination / path).parent.mkdir(parents=True, exist_ok=True)
            (destination / path).write_bytes(data)


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise ConversionError(
            f"{describe(path)}: files beside the weights have {size / 1e9:.1f} GB, more than {limit / 1e9:.1f} GB: move what is "
            "not the model's elsewhere"
        )


# ---- walking ----


def _walk(root: Path) -> Iterator[Path]:
    """Relative paths of the files, in order."""
    real = Path(os.path.realpath(root))
    entries = 0
    stack: list[tuple[Path, tuple[Path, ...]]] = [(Path(), (real,))]
    while stack:
        folder, above = stack.pop()
        try:
            found = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ConversionError(f"cannot read {describe(root / folder)}: {error.strerror}") from error
        folders = []
        for entry in found:
            entries += 1
            path = folder / entry.name
            if entries > _MAX_ENTRIES or len(above) > _MAX_DEPTH:
                raise ConversionError(
                    f"{describe(root)} has too many files and folders to be a model's: at {describe(path)}"
                )
            if _is_folder(real, root, path, entry):
                inside = Path(os.path.realpath(root / path))
                if inside in above:
                    raise ConversionError(f"{describe(root / path)} is a link to a folder that it lies in: remove it")
                if entry.name not in _SKIPPED_DIRECTORIES:
                    _check_link(real, root / path, inside, entry)
                    folders.append((path, (*above, inside)))
            elif entry.name != ".git":  # a file in submodules and work trees
                yield path
        stack.extend(reversed(folders))


def _is_folder(real: Path, root: Path, path: Path, entry: os.DirEntry) -> bool:
    """Tells folders from files; anything else is refused."""
    try:
        if entry.is_dir():
            return True
        if entry.is_file():
            _check_link(real, root / path, Path(os.path.realpath(root / path)), entry)
            return False
    except OSError as error:  # a link in a circle
        raise ConversionError(f"cannot read {describe(root / path)}: {error.strerror}") from error
    if entry.is_symlink() and not os.path.exists(root / path):
        if is_weights(entry.name):
            return False  # whoever reads it says so
        raise ConversionError(
            f"{describe(root / path)} is a link to nothing ({describe(os.readlink(root / path))}): restore the file, or remove it"
        )
    raise ConversionError(
        f"{describe(root / path)} is neither a file nor a folder, but a pipe, a socket or a device: remove it"
    )


def _check_link(root: Path, path: Path, target: Path, entry: os.DirEntry) -> None:
    """Refuses a link that leads out of the folder to what is no part of a model."""
    if not entry.is_symlink() or target.is_relative_to(root) or _in_hub_cache(root, target):
        return
    if target.is_dir():
        allowed = any((target / name).is_file() for name in _PARTS)
    else:
        named = any(fnmatch.fnmatch(entry.name, pattern) for pattern in _MODEL_FILES)
        allowed = is_weights(entry.name) or (named and entry.name == target.name)
    if not allowed:
        raise ConversionError(
            f"{describe(path)} is a link out of the model's folder, to {describe(target)}, which would be copied into "
            "checkpoints and exports: put the file itself there, or remove the link"
        )


def _in_hub_cache(root: Path, target: Path) -> bool:
    """The layout of the hub's cache: snapshots/REVISION/NAME -> blobs/HASH."""
    return any(
        above.name == "snapshots" and target.is_relative_to(above.parent / "blobs") for above in (root, *root.parents)
    )
