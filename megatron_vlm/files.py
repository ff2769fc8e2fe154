"""Files as every part of the house reads and writes them: one path, one read, one write, one digest.

expand_path    "~/x", "$DATA/x" -> Path, wherever a path enters (flags, YAML, environment); expand_text: as text, or a hub id
read_*         regular files only, of bounded size; a pipe, a device or an endless link is an error, not a hang
write_synced   appears whole or not at all
unique_temporary, remove_abandoned   names that no other process uses, and what dead ones left
folder_beside, replace_folder        a folder made under such a name, and put in its place

Errors are of the class that the caller names, so that a message speaks of a config, a checkpoint or a sample.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError, MegatronVLMError, printable

MAX_TEXT_BYTES = 256 << 20
"""Largest file read as one text: a tokenizer.json has tens of megabytes, an index of a very large model a few."""

_LFS = b"version https://git-lfs.github.com/spec"

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand_path(path: str | os.PathLike, what: str = "path") -> Path:
    """Returns the path with ``~`` and environment variables expanded, as ``expand_text`` does."""
    return Path(expand_text(os.fspath(path), what))


def expand_text(text: str, what: str = "path") -> str:
    """Returns a path, or a hub id, with ``~`` and environment variables expanded, and all else as it is written.

    Args:
        text: as the user wrote it.
        what: the setting it came from, for the error.

    Raises:
        ConfigError: an empty text, a variable that is not set, a user that does not exist, or a name that no file can have.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"{what} {text!r}: the environment variable {name} is not set")
        return os.environ[name]

    if "\0" in text:
        raise ConfigError(f"{what} {text!r}: a path has no null byte")
    expanded = _VARIABLE.sub(value, text)
    if not expanded:  # else it would be read as the folder that the program runs in
        raise ConfigError(f"{what} {text!r} is empty: name a path, or leave it out")
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{what} {text!r}: {error}") from error


def open_regular(path: str | os.PathLike, error: type[MegatronVLMError] = ConfigError) -> BufferedReader:
    """Opens a regular file for reading bytes; never waits for the writer of a pipe.

    Raises:
        MegatronVLMError: of class ``error``: absent, unreadable, or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as caught:  # ValueError: a null byte in the name
        raise error(f"cannot read {describe(path)}: {reason_of(caught)}") from caught
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise error(f"cannot read {describe(path)}: it is {_kind(mode)}, not a file")
    return open(descriptor, "rb")


def read_bytes(
    path: str | os.PathLike, error: type[MegatronVLMError] = ConfigError, max_bytes: int = MAX_TEXT_BYTES
) -> bytes:
    """Reads a whole regular file.

    Raises:
        MegatronVLMError: of class ``error``: as ``open_regular``, or the file has more than ``max_bytes``.
    """
    with open_regular(path, error) as file:
        try:
            # As many bytes as there are: room for all that is asked for is taken before any of it is read.
            data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
            while len(data) <= max_bytes and (more := file.read(1 << 20)):  # it grows, or does not know its size
                data += more
        except OSError as caught:
            raise error(f"cannot read {describe(path)}: {reason_of(caught)}") from caught
    if len(data) > max_bytes:
        raise error(f"{describe(path)} has more than {max_bytes:,} bytes, the limit for such a file")
    return data


def lfs_pointer(data: bytes) -> bool:
    """Whether the first bytes of a file are those of a Git LFS pointer, which stands where ``git clone`` left the file out."""
    return data.startswith(_LFS)


def refuse_lfs_pointer(path: str | os.PathLike, data: bytes, error: type[MegatronVLMError] = ConfigError) -> None:
    """Refuses a Git LFS pointer in place of a file that begins with ``data``.

    Raises:
        MegatronVLMError: of class ``error``: it is one; the message says how the file is fetched.
    """
    if lfs_pointer(data):
        folder = describe(Path(path).parent)
        raise error(
            f"{describe(path)} is a Git LFS pointer, not the file itself: fetch it with `git -C {folder} lfs pull`"
        )


def read_text(
    path: str | os.PathLike, error: type[MegatronVLMError] = ConfigError, max_bytes: int = MAX_TEXT_BYTES
) -> str:
    """Reads a whole UTF-8 text; the same errors, and one for bytes that are not UTF-8. Line ends become ``\\n``."""
    try:
        text = read_bytes(path, error, max_bytes).decode("utf-8")
    except UnicodeDecodeError as caught:
        raise error(f"{describe(path)} is not UTF-8 text: {caught.reason} at byte {caught.start}") from caught
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_value(
    path: str | os.PathLike, error: type[MegatronVLMError] = ConfigError, max_bytes: int = MAX_TEXT_BYTES
) -> Any:
    """Reads any JSON value; the same errors, and one for what is not JSON."""
    text = read_text(path, error, max_bytes)
    refuse_lfs_pointer(path, text[:64].encode(errors="replace"), error)
    try:
        return json.loads(text)
    except ValueError as caught:
        raise error(f"{describe(path)} is not valid JSON: {caught}") from caught
    except RecursionError as caught:
        raise error(f"{describe(path)} is not valid JSON: nested too deeply") from caught


def read_json(
    path: str | os.PathLike, error: type[MegatronVLMError] = ConfigError, max_bytes: int = MAX_TEXT_BYTES
) -> dict[str, Any]:
    """Reads a JSON object; the same errors, and one for a value of another kind."""
    data = read_json_value(path, error, max_bytes)
    if not isinstance(data, dict):
        raise error(f"{describe(path)} must hold a JSON object, got {type(data).__name__}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON object as HF does, whole or not at all."""
    write_synced(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file that appears whole, or not at all.

    Raises:
        OSError: as the disk says; nothing is left behind.
    """
    with synced_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def synced_file(path: Path) -> Iterator[BufferedWriter]:
    """Opens a file that appears whole when the block ends, or where that fails not at all; errors as of ``write_synced``."""
    temporary = unique_temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def trial_write(folder: Path, what: str, error: type[MegatronVLMError] = ConfigError) -> None:
    """Writes a small file into a folder, or where that would be made, and removes it.

    Raises:
        MegatronVLMError: of class ``error``: nothing can be written there; ``what`` names the setting.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise error(f"{what} {describe(folder)}: {describe(there)} is no folder")
    trial = unique_temporary(there / "trial")
    try:
        with trial.open("xb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as caught:
        raise error(f"{what} {describe(folder)} cannot be written: {reason_of(caught)}") from caught
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a disk says while ``path`` is written into an error that a user can read.

    Raises:
        ConfigError: disk full, no permission, a name too long ...; names the path, and the file where that is another.
    """
    try:
        yield
    except (OSError, UnicodeEncodeError) as caught:
        name = getattr(caught, "filename", None)
        at = f" ({describe(os.fsdecode(name))})" if name is not None and os.fspath(path) != name else ""
        full = getattr(caught, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = ": make room, or choose a place on another disk" if full else ""
        raise ConfigError(f"cannot write {describe(path)}: {reason_of(caught)}{at}{advice}") from caught


def unique_temporary(path: Path) -> Path:
    """Returns a name beside ``path`` that no other process uses, and that says whose it is: ``.NAME.HOST.PID.ID.tmp``.

    A process id alone is not unique: the first process of every container has the same.
    """
    # A name may have 255 bytes in all; the end of a long one tells nothing apart that the id does not.
    name = os.fsencode(path.name)[:150].decode(errors="ignore")
    return path.with_name(f".{name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def remove_abandoned(path: Path, *, others: bool = False) -> None:
    """Removes what processes of this host that no longer live left under ``unique_temporary(path)``; ``others``: of any name in
    its folder."""
    prefix = ".+" if others else re.escape(os.fsencode(path.name)[:150].decode(errors="ignore"))
    left = re.compile(rf"\.{prefix}\.{re.escape(_host())}\.(\d+)\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for entry in list(path.parent.iterdir()):
            match = left.fullmatch(entry.name)
            if match and not process_lives(int(match[1])):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A name for a folder beside ``target``, absent before and removed after; what killed processes left there goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target)
    if _old(target).exists() and not target.exists():  # killed while it was replaced
        _old(target).rename(target)
    folder = unique_temporary(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path, target: Path) -> None:
    """Puts ``folder`` in the place of ``target``, if there is one; after a kill in between ``folder_beside`` gives that back."""
    if target.exists():
        shutil.rmtree(_old(target), ignore_errors=True)
        target.rename(_old(target))
    folder.rename(target)
    shutil.rmtree(_old(target), ignore_errors=True)


def _old(target: Path) -> Path:
    """Where a folder is while another takes its place."""
    return target.with_name(f".{target.name}.old")


def check_output(
    out: str | os.PathLike,
    sources: Iterable[str | os.PathLike],
    what: str,
    error: type[MegatronVLMError] = ConfigError,
    *,
    around: bool = False,
) -> None:
    """Refuses an output that is one of the folders it is made from, lies in one, or holds one; links are followed.

    Such an output would be copied into itself, be read as part of its source, or take the place of it.

    Args:
        out: need not exist.
        sources: folders; what does not exist, as a hub id, is passed over.
        what: the setting that names ``out``.
        error: class of the error.
        around: ``out`` may hold a source.

    Raises:
        MegatronVLMError: of class ``error``, naming both.
    """
    for source in sources:
        if not os.path.isdir(source):  # False too for a name that no file can have
            continue
        try:
            target, real = Path(os.path.realpath(out)), Path(os.path.realpath(source))
        except ValueError as caught:
            raise error(f"{what} {describe(out)}: no file can have this name: {caught}") from caught
        if target == real:
            problem = "is the folder"
        elif target.is_relative_to(real):
            problem = "lies in the folder"
        elif real.is_relative_to(target) and not around:
            problem = "holds the folder"
        else:
            continue
        raise error(f"{what} {describe(out)} {problem} {describe(source)} that it is made from: choose another place")


def process_lives(pid: int) -> bool:
    """Whether a process of this host has the number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def sync_tree(root: Path) -> None:
    """Flushes every file and directory under ``root`` to disk."""
    for directory, _, files in os.walk(root):
        for name in files:
            sync_path(Path(directory, name))
        sync_path(Path(directory))


def sync_path(path: Path) -> None:
    """Flushes one file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: str | os.PathLike, error: type[MegatronVLMError] = ConfigError) -> dict[str, Any]:
    """``{"size", "sha256"}`` of a regular file.

    Raises:
        MegatronVLMError: of class ``error``: as ``open_regular``.
    """
    with open_regular(path, error) as file:
        try:
            return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        except OSError as caught:
            raise error(f"cannot read {describe(path)}: {reason_of(caught)}") from caught


def describe(path: str | os.PathLike) -> str:
    """The path as a message can show it: names that are not text, and very long ones, included."""
    try:
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, which no file system has
        text = printable(os.fsdecode(path))
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def reason_of(error: OSError | ValueError) -> str:
    """What the system says of a failed call, without the number and the path that the message has anyhow."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _host() -> str:
    """Where process ids mean what they mean here: the host, what tells it from others of its name, and the pid namespace.

    What was left before a restart of the host or container stays: whose it is cannot be told.
    """
    host, facts = socket.gethostname(), []
    with contextlib.suppress(OSError):  # not Linux
        facts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    digest = hashlib.sha256(repr([host, *facts]).encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "-", host)[:40] + f"-{digest}"
