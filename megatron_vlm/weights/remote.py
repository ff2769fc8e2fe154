"""Checkpoints in a store that has a URL (s3://, gs://, whatever fsspec knows): written here first, whole there or not at all.

    iter_N/ of the staging folder --upload--> URL/iter_N/{rank files, ..., manifest.json last}; URL/tracker
    URL --fetch--> iter_N/ of a folder here, compared with its manifest

A store has no rename: the manifest is what makes a folder a checkpoint, so it goes there last, and first where one is removed.
What is needed to get in (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...) comes from the environment, as the store's library reads it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import (
    folder_beside,
    read_json,
    remove_abandoned,
    replace_folder,
    write_json,
    write_synced,
)
from megatron_vlm.log import get_logger
from megatron_vlm.weights.checkpoint_dir import (
    MANIFEST,
    SEQUENCE,
    TRACKER,
    checkpoint_record,
    folder_name,
    is_iteration,
    iteration_of,
    verify,
)

T = TypeVar("T")
_TRIES = 4
_WAIT_SECONDS = 1.0
"""Before the second try; each further wait is twice as long."""
_MODEL = "model"
"""Folder of what is no training checkpoint, beside fetched iterations."""
_PACKAGES = {"s3": "pip install 'megatron_vlm[s3]'", "gs": "pip install gcsfs"}

log = get_logger(__name__)


def is_url(text: str | os.PathLike | None) -> bool:
    """Whether it names a place that is not in this host's file systems."""
    return "://" in str(text or "")


def upload(folder: Path, url: str, keep_last: int | None, keep: int | None = None, beside: Sequence[str] = ()) -> None:
    """Copies a checkpoint into the store, then removes there what ``keep_last`` says, as ``checkpoint_write.purge`` does here.

    Args:
        folder: ``iter_N``; every file is compared with its manifest first.
        url: that holds iterations.
        keep_last: None keeps all.
        keep: iteration that stays in any case.
        beside: files beside ``folder`` that go along.

    Raises:
        CheckpointError: a file was changed, or the store refuses it again and again; what is there already is untouched.
    """
    record, store = checkpoint_record(folder), Store(url)
    record.check_digests()
    store.remove(f"{folder.name}/{MANIFEST}")
    for name in [*record.files, MANIFEST]:
        store.put(folder / name, f"{folder.name}/{name}")
    for name in (TRACKER, *beside):
        store.put(folder.parent / name, name)
    if keep_last is not None:
        _purge(store, iteration_of(folder), keep_last, keep)


def _purge(store: "Store", newest: int, keep_last: int, keep: int | None) -> None:
    """Removes what ``upload`` says, and what killed uploads and removals left. The new checkpoint is whole: no failure is its."""
    try:
        kept = [number for number in store.sequences() if number <= newest][-keep_last:]
        for number in store.iterations():
            if number <= newest and number not in (*kept, keep):
                store.remove(f"{folder_name(number)}/{MANIFEST}")
                store.remove(folder_name(number))
    except CheckpointError as error:
        log.warning("old checkpoints of %s stay: %s", store.url, error)


def newest_sequence(url: str) -> int:
    """The number of the last save in the store; 0: none is there.

    Raises:
        CheckpointError: the store does not answer.
    """
    return max(Store(url).sequences().values(), default=0)


def fetch(url: str, into: Path | None = None, ckpt_step: int | None = None) -> Path:
    """Brings the newest sound checkpoint of a store here, or a model folder, and returns what ``--load`` takes.

    Processes of one host that ask for the same wait for the one that fetches.

    Args:
        url: a folder of iterations, one of them, or a folder of a model.
        into: folder of a run that saves to this very URL: it is filled up and returned. None: a cache.
        ckpt_step: iteration; None: the newest.

    Raises:
        CheckpointError: the store does not answer, or nothing whole lies there.
    """
    url = url.rstrip("/")
    parent, _, name = url.rpartition("/")
    if is_iteration(Path(name)):
        return fetch(parent, into, iteration_of(Path(name)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_vlm" / "remote"
    root = into or cache / hashlib.sha256(url.encode()).hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".fetch.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_abandoned(root / _MODEL, others=True)  # killed fetches, of iterations too that nobody asks for again
        store = Store(url)
        known = store.sequences()
        if not known and ckpt_step is None and into is None:
            return _fetch_model(store, root)
        wanted = sorted(known, key=lambda number: known[number], reverse=True) if ckpt_step is None else [ckpt_step]
        problems = []
        for number in wanted:
            try:
                found = _fetch_iteration(store, root, number, own=into is not None)
            except _NoAnswer:  # what lies there may be sound: an older one would lose the work since
                raise
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                log.warning("passed over: %s", problem)
            return root if into is not None else found
    there = ", ".join(map(str, sorted(known))) or "none"
    raise CheckpointError(
        f"no checkpoint can be fetched from {url} (iterations there: {there})\n  " + "\n  ".join(problems)
    )


def fetch_file(url: str, name: str, path: Path) -> None:
    """Brings a file beside the iterations of a store here, if it is there.

    Raises:
        CheckpointError: the store does not answer.
    """
    with contextlib.suppress(FileNotFoundError):
        Store(url).get(name, path)


def iterations(url: str) -> list[int]:
    """Iterations that have a manifest in the store, in order; nothing where there is no such place.

    Raises:
        CheckpointError: the store does not answer.
    """
    return sorted(Store(url).sequences())


class _NoAnswer(CheckpointError):
    """A store failed each time it was tried."""


class Store:
    """A folder in a store; every call is tried again.

    Raises:
        CheckpointError: nothing here speaks to such a store; the message says what to install.
    """

    def __init__(self, url: str):
        import fsspec  # costs a tenth of a second, and is needed for URLs alone

        self.url = url.rstrip("/")
        options = (
            {"auto_mkdir": True} if self.url.startswith(("file:", "local:")) else {}
        )  # a store has no folders to make
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            scheme = self.url.partition("://")[0]
            advice = f": {_PACKAGES[scheme]}" if scheme in _PACKAGES else ""
            raise CheckpointError(f"{self.url} cannot be used ({error}){advice}") from error

    def put(self, path: Path, name: str) -> None:
        """Copies a file there, and compares its size.

        Raises:
            CheckpointError: it cannot be written.
        """

        def work() -> None:
            self._files.put_file(str(path), f"{self._root}/{name}")
            found, size = self._files.info(f"{self._root}/{name}")["size"], path.stat().st_size
            if found != size:
                raise OSError(f"it has {found:,} bytes there, {size:,} here")

        self._try(f"uploading {path} to {self.url}/{name}", work)

    def get(self, name: str, path: Path) -> None:
        """Copies a file from there.

        Raises:
            CheckpointError: it cannot be read.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._try(f"fetching {self.url}/{name}", lambda: self._files.get_file(f"{self._root}/{name}", str(path)))

    def remove(self, name: str) -> None:
        """Removes a file or a folder, if it is there.

        Raises:
            CheckpointError: it cannot be removed.
        """

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm(f"{self._root}/{name}", recursive=True)

        self._try(f"removing {self.url}/{name}", work)

    def sequences(self) -> dict[int, int]:
        """Iterations with a manifest -> the number in it that grows with every save; in order of iterations."""
        found = {}
        for number in self.iterations():
            name = f"{folder_name(number)}/{MANIFEST}"
            with contextlib.suppress(FileNotFoundError):  # being removed, or not whole yet
                text = self._try(f"reading {self.url}/{name}", partial(self._files.cat_file, f"{self._root}/{name}"))
                found[number] = _sequence(text)
        return found

    def iterations(self) -> list[int]:
        """Iterations that have a folder, whole or not, in order."""
        try:
            paths = self._try(f"listing {self.url}", lambda: self._files.ls(self._root, detail=False))
        except FileNotFoundError:
            return []
        return sorted(iteration_of(Path(path)) for path in paths if is_iteration(Path(path)))

    def files(self) -> dict[str, tuple[int, str]]:
        """Files below this folder -> (size, digest of what the store says of it: its own digest or date among that)."""
        try:
            found = self._try(f"listing {self.url}", lambda: self._files.find(self._root, detail=True))
        except FileNotFoundError:
            return {}
        return {
            path.removeprefix(self._root).lstrip("/"): (
                entry["size"],
                hashlib.sha256(repr(sorted(entry.items())).encode()).hexdigest(),
            )
            for path, entry in found.items()
        }

    def _try(self, what: str, work: Callable[[], T]) -> T:
        """Raises FileNotFoundError as it is, and CheckpointError for all else that lasts."""
        wait = _WAIT_SECONDS
        for left in range(_TRIES - 1, -1, -1):
            try:
                return work()
            except FileNotFoundError:
                raise
            except Exception as error:  # each store has classes of its own for what goes wrong
                reason = f"{type(error).__name__}: {error}"
                if not left:
                    raise _NoAnswer(f"{what} failed {_TRIES} times, the last with {reason}") from error
                log.warning("%s failed, %d more tries, the next in %g s: %s", what, left, wait, reason)
                time.sleep(wait)
                wait *= 2
        raise AssertionError


def _sequence(manifest: bytes) -> int:
    """Of a checkpoint, the number that grows with every save; 0: damaged, which is told where it is fetched."""
    try:
        return int(json.loads(manifest).get(SEQUENCE, 0))
    except (ValueError, TypeError, AttributeError):
        return 0


def _fetch_iteration(store: Store, root: Path, number: int, own: bool) -> Path:
    """``own``: the folder is of a run that saves there, and may know more than the store."""
    name = folder_name(number)
    final = root / name
    with folder_beside(final) as temporary:
        try:
            store.get(f"{name}/{MANIFEST}", temporary / MANIFEST)
        except FileNotFoundError as error:
            raise CheckpointError(f"{store.url}/{name} has no {MANIFEST}: it is not there, or not whole") from error
        there = (temporary / MANIFEST).read_bytes()
        with contextlib.suppress(CheckpointError, OSError):
            here = (final / MANIFEST).read_bytes()
            # A later save of this iteration that the store has not got, as it did not answer, is not replaced.
            if here == there or (own and _sequence(here) > _sequence(there)):
                verify(final, hashes=False)
                return final
        listed = read_json(temporary / MANIFEST, CheckpointError)
        began = time.monotonic()
        for file in _names(listed, store, name):
            try:
                store.get(f"{name}/{file}", temporary / file)
            except FileNotFoundError as error:
                raise CheckpointError(f"{store.url}/{name}/{file} is missing: {MANIFEST} lists it") from error
        verify(temporary)
        replace_folder(temporary, final)
    write_synced(root / TRACKER, f"{number}\n".encode())
    log.info("fetched %s/%s to %s in %.1f s", store.url, name, final, time.monotonic() - began)
    return final


def _fetch_model(store: Store, root: Path) -> Path:
    files, final, known = store.files(), root / _MODEL, root / f"{_MODEL}.json"
    if not files:
        raise CheckpointError(f"{store.url} holds nothing: neither checkpoints nor a model")
    stamps = {name: stamp for name, (_, stamp) in files.items()}
    with contextlib.suppress(CheckpointError):
        if all((final / name).is_file() for name in files) and read_json(known, CheckpointError) == stamps:
            return final
    with folder_beside(final) as temporary:
        for name, (size, _) in files.items():
            if ".." in Path(name).parts:
                raise CheckpointError(f"{store.url} holds {name!r}, which leads out of the folder")
            store.get(name, temporary / name)
            if (found := (temporary / name).stat().st_size) != size:
                raise CheckpointError(f"{store.url}/{name} has {size:,} bytes, {found:,} came: fetch it again")
        replace_folder(temporary, final)
    write_json(known, stamps)
    return final


def _names(manifest: dict[str, Any], store: Store, name: str) -> list[str]:
    """Files that a manifest lists; none leads out of its folder."""
    files = manifest.get("files")
    if not isinstance(files, dict) or any(Path(file).is_absolute() or ".." in Path(file).parts for file in files):
        raise CheckpointError(f"{store.url}/{name}/{MANIFEST} is damaged: its list of files cannot be read")
    return list(files)
