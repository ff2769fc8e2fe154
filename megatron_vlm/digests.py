"""Which bytes a folder should hold: the one check of files against the digests that were recorded of them.

    Record (folder, which file lists what) --check_sizes, check_digests--> nothing, or an error that names the file
    files of a folder --write_listing--> megatron_vlm_files.json --listed--> Record
    JSON object --sealed--> the same with a digest of itself --check_seal--> nothing, or an error

``megatron.json``, the ``manifest.json`` of a checkpoint and the list beside an adapter are such records.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from megatron_vlm.errors import MegatronVLMError
from megatron_vlm.files import describe, file_digest, read_json, write_json
from megatron_vlm.log import get_logger

LISTING = "megatron_vlm_files.json"
"""Beside the files of an adapter: their sizes and digests."""
LISTING_FORMAT = "megatron_vlm.files.1"
SEAL = "digest"
_LARGE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was recorded of a folder's files.

    Attributes:
        folder: that holds them.
        source: name of the file that says so.
        files: path relative to ``folder`` -> ``{"size", "sha256"}``.
        error: class of the errors.
        advice: what to do about a file that differs.
        hashed: path -> function that gives the sha256 more cheaply than a read of the whole file.
    """

    folder: Path
    source: str
    files: Mapping[str, Mapping[str, Any]]
    error: type[MegatronVLMError]
    advice: str = "fetch it again, or make the folder again"
    hashed: Mapping[str, Callable[[], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"{describe(self.folder / self.source)} is damaged"
        if not isinstance(self.files, dict):
            raise self.error(f"{where}: its list of files cannot be read")
        for name, entry in self.files.items():
            sound = (
                isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
            )
            if not sound:
                raise self.error(f"{where}: its entry of {name!r} has no size and sha256")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
                raise self.error(f"{where}: it lists {name!r}, which lies outside the folder")

    def check_sizes(self) -> None:
        """Compares every file's size.

        Raises:
            MegatronVLMError: a file is absent or of another size.
        """
        for name, entry in self.files.items():
            path = self.folder / name
            try:
                found = path.stat().st_size if path.is_file() else -1
            except OSError as error:
                raise self.error(f"{describe(path)} cannot be read: {error.strerror}") from error
            if found < 0:
                raise self.error(f"{describe(path)} is missing: {self.source} lists it")
            if found != entry["size"]:
                raise self.error(
                    f"{describe(path)} has {found:,} bytes, {self.source} says {entry['size']:,}: it is truncated or was replaced"
                )

    def check_digests(self, names: Iterable[str] | None = None, *, share: int = 0, shares: int = 1) -> None:
        """Compares the sha256 of each ``shares``-th file from ``share`` on; the largest first, so that shares are about equal.

        Args:
            names: only these; None: all.
            share, shares: what this process reads, where several share the work.

        Raises:
            MegatronVLMError: a file was changed.
        """
        chosen = {name: self.files[name] for name in (self.files if names is None else names)}
        if sum(entry["size"] for entry in chosen.values()) > _LARGE and share == 0:
            get_logger(__name__).info("checking the digests of %d files in %s", len(chosen), self.folder)
        for name in sorted(chosen, key=lambda name: (-chosen[name]["size"], name))[share::shares]:
            known = self.hashed.get(name)
            digest = known() if known else file_digest(self.folder / name, self.error)["sha256"]
            if digest != chosen[name]["sha256"]:
                raise self.error(
                    f"{describe(self.folder / name)} was changed: its sha256 is not the one in {self.source}: {self.advice}"
                )


class Hashing:
    """Digests of files, taken by a thread while something else goes on.

    Args:
        folder: that holds them.
        names: relative to it.
        error: class of the errors.
    """

    def __init__(self, folder: Path, names: Iterable[str], error: type[MegatronVLMError]):
        self._pool = ThreadPoolExecutor(1)
        self._futures = {name: self._pool.submit(file_digest, folder / name, error) for name in names}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> dict[str, dict[str, Any]]:
        """Name -> ``{"size", "sha256"}`` of all, once they are there.

        Raises:
            MegatronVLMError: a file cannot be read.
        """
        return {name: future.result() for name, future in self._futures.items()}


def check_records(records: Iterable[Record], *, share: int = 0, shares: int = 1) -> None:
    """Compares the digests of several folders' files; see ``Record.check_digests``."""
    for record in records:
        record.check_digests(share=share, shares=shares)


# ---- lists beside files that have no other record ----


def write_listing(folder: Path) -> None:
    """Writes ``megatron_vlm_files.json`` with the digests of the files that lie in ``folder``, not below."""
    files = {
        path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != LISTING
    }
    write_json(folder / LISTING, sealed({"format": LISTING_FORMAT, "files": files}))


def listed(folder: Path, error: type[MegatronVLMError]) -> tuple[Record, ...]:
    """The record that ``write_listing`` left in a folder; nothing where there is none.

    Raises:
        MegatronVLMError: of class ``error``: the list is damaged, or a file is absent or of another size.
    """
    path = folder / LISTING
    if not path.exists():
        return ()
    data = read_json(path, error)
    check_seal(data, path, error)
    if data.get("format") != LISTING_FORMAT:
        raise error(f"{describe(path)} has format {data.get('format')!r}, this version reads {LISTING_FORMAT!r}")
    record = Record(
        folder=folder,
        source=LISTING,
        files=data.get("files"),  # type: ignore[arg-type]  # checked by Record
        error=error,
        advice=f"fetch the folder again; where the file was changed on purpose, remove {LISTING}",
    )
    record.check_sizes()
    return (record,)


# ---- lists that know when they were changed themselves ----


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of its own values in it."""
    return {**data, SEAL: _digest_of(data)}


def check_seal(data: Mapping[str, Any], path: Path, error: type[MegatronVLMError], *, required: bool = True) -> None:
    """Compares an object with the digest in it.

    Args:
        data: as read.
        path: of its file.
        error: class of the error.
        required: False: an object without a digest passes, as older versions wrote it.

    Raises:
        MegatronVLMError: it was changed.
    """
    if SEAL not in data and not required:
        return
    if data.get(SEAL) != _digest_of(data):
        raise error(f"{describe(path)} was changed: its values are not those of its own digest: restore the file")


def _digest_of(data: Mapping[str, Any]) -> str:
    values = {key: value for key, value in data.items() if key != SEAL}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
