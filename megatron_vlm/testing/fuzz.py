"""Seeded damage to files, and commands run on it with a bound on time and memory.

    damage(path, rng) -> what was done          one file or one of a folder's, by what kind of file it is
    run_forked(fn, seconds) -> Outcome          in a fork of this process, which has imported everything

What a command may do with damaged input: succeed, exit 1 with a message that names the file, or 2 for usage.
"""

import contextlib
import json
import os
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 1024\n"
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "\ud800", "../../x", "/etc/passwd", "{{", "a" * 5000, -1, 0, 1, 3, 0.5, -0.5,
    10**12, -(10**12), 10**30, 1e308, float("nan"), float("inf"), [], [0], ["x"], [[[]]], {}, {"x": 1}, [None] * 50,
)  # fmt: skip
NESTED_LOOPS = "".join(f"{{% for {name} in range(9999) %}}" for name in "abc") + "x" + "{% endfor %}" * 3
YAML_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi")
)


def damage(path: Path, rng: random.Random, only: str = "*") -> str:
    """Damages ``path``, or one file of the folder ``path`` (of those that match ``only``).

    Returns:
        What was done to which file, its name first.
    """
    files = sorted(p for p in path.rglob(only) if p.is_file()) if path.is_dir() else [path]
    file = rng.choice(files)
    kinds: list[Callable[[Path, random.Random], str]] = [*_ANY, *_BY_SUFFIX.get(file.suffix, []) * 5]
    return f"{file.name}: {rng.choice(kinds)(file, rng)}"


def flip_bit(path: Path, rng: random.Random) -> str:
    """Flips one bit in place."""
    data = bytearray(path.read_bytes())
    if not data:
        return "nothing to flip"
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} flipped"


# ---- any file ----


def _cut(path: Path, rng: random.Random) -> str:
    size = rng.randrange(max(path.stat().st_size, 1))
    os.truncate(path, size)
    return f"cut to {size} bytes"


def _empty(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def _remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "removed"


def _noise(path: Path, rng: random.Random) -> str:
    path.write_bytes(rng.randbytes(rng.choice([1, 7, 512, 5000])))
    return "noise in its place"


def _zeros(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 64, 4096]))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return f"bytes {start} to {end} zero"


def _longer(path: Path, rng: random.Random) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 100])))
    return "bytes added at its end"


def _pipe(path: Path, rng: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe in its place"


def _device(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/random"]))
    return f"a link to {os.readlink(path)} in its place"


def _loop(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself in its place"


def _folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def _pointer(path: Path, rng: random.Random) -> str:
    path.write_bytes(LFS_POINTER)
    return "a Git LFS pointer in its place"


_ANY = [flip_bit, flip_bit, _cut, _empty, _remove, _noise, _zeros, _longer, _pipe, _device, _loop, _folder, _pointer]


# ---- by kind ----


def odd_json(path: Path, rng: random.Random) -> str:
    """Replaces, removes or doubles one value somewhere in a JSON file (or in one line of a jsonl)."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    at = rng.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[at])
    except (ValueError, IndexError):
        return _noise(path, rng)
    lines[at], done = odd_value(value, rng)
    path.write_text("\n".join(lines) + ("\n" if path.suffix == ".jsonl" else ""), encoding="utf-8")
    return done


def odd_value(value: Any, rng: random.Random) -> tuple[str, str]:
    """Returns JSON text of ``value`` with one part of it odd, and what was done."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places:
        return json.dumps(rng.choice(ODD_VALUES)), "another value"
    # Half of the time near the top, where the settings are; a tokenizer's vocabulary has most of the places.
    node, key = rng.choice(places[:40] if rng.random() < 0.5 else places)
    kind = rng.choice(["odd", "odd", "odd", "odd", "gone", "renamed", "deep", "twice"])
    if kind == "gone":
        del node[key]
    elif kind == "renamed" and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif kind == "deep":
        node[key] = "@deep@"
        return json.dumps(value).replace('"@deep@"', "[" * 100_000 + "]" * 100_000), f"{key!r} nested 100,000 deep"
    elif kind == "twice" and isinstance(node, dict):
        text, odd = json.dumps(value), rng.choice(ODD_VALUES)
        name = json.dumps(key)
        return text.replace(f"{name}:", f"{name}: {json.dumps(odd)}, {name}:", 1), f"{key!r} twice"
    else:
        node[key] = rng.choice(ODD_VALUES)
        return json.dumps(value), f"{key!r} is {str(node[key])[:30]!r}"
    return json.dumps(value), f"{key!r} {kind}"


def _safetensors(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    kind = rng.choice(["length", "header", "header", "header"])
    if kind == "length":
        wrong = rng.choice([0, 1, size - 1, size + 1, 1 << 40, (1 << 64) - 1])
        path.write_bytes(struct.pack("<Q", wrong) + data[8:])
        return f"header of {wrong} bytes"
    text, done = odd_value(json.loads(data[8 : 8 + size]), rng)
    header = text.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    return f"header: {done}"


def _template(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8")
    odd = rng.choice(
        [NESTED_LOOPS, "{% for %}", "{{ 1/0 }}", "{{ messages.__class__ }}", "{{ 'x' * 10**10 }}", "{{ a.b.c }}"]
    )
    path.write_text(odd if rng.random() < 0.5 else text + odd, encoding="utf-8")
    return f"template with {odd[:20]}"


def _npy(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = rng.randrange(min(len(data), 128))
    data[at : at + 4] = rng.choice([b"9999", b"\xff\xff\xff\xff", b"'|O'", b"(-1,"])
    path.write_bytes(data)
    return f"numpy header changed at byte {at}"


def _tar(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    block = rng.randrange(max(len(data) // 512, 1)) * 512
    field, width = rng.choice([(0, 100), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155)])
    data[block + field : block + field + width] = rng.choice([b"\xff" * width, b"7" * width, bytes(width)])
    path.write_bytes(data)
    return f"header field {field} of the block at {block} changed"


def _yaml(path: Path, rng: random.Random) -> str:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    kind = rng.choice(["bomb", "twice", "odd", "odd", "odd", "tab", "tag"])
    if kind == "bomb":
        path.write_text(YAML_BOMB + text)
    elif kind == "twice" and lines:
        path.write_text(text + "\n" + rng.choice(lines) + "\n")
    elif kind == "odd" and lines:
        at = rng.randrange(len(lines))
        odd = rng.choice(ODD_VALUES)
        lines[at] = lines[at].split(":")[0] + ": " + json.dumps(odd)
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text(text + ("\t- x: [\n" if kind == "tab" else "\nx: !!python/object/apply:os.system ['true']\n"))
    return f"yaml {kind}"


_BY_SUFFIX: dict[str, list[Callable[[Path, random.Random], str]]] = {
    ".json": [odd_json], ".jsonl": [odd_json], ".safetensors": [_safetensors], ".jinja": [_template], ".npy": [_npy],
    ".tar": [_tar], ".yaml": [_yaml],
}  # fmt: skip


# ---- running ----


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command did: exit code (-n: signal n; None: not done in time), its output, how long it took."""

    code: int | None
    output: str
    seconds: float

    def fault(self, names: Sequence[str]) -> str:
        """Empty where the outcome is an accepted one, else what is wrong; ``names``: one of which a message must say."""
        if self.code is None:
            return f"not done after {self.seconds:.0f} s"
        if "Traceback (most recent call last)" in self.output:
            return "a traceback"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.code == 1 and not any(name in self.output for name in names):
            return "exit code 1 without naming the file"
        return ""


def run_forked(fn: Callable[[], int], log: Path, seconds: float = 10, more_bytes: int = 2 << 30) -> Outcome:
    """Runs ``fn`` in a fork of this process, which may take ``more_bytes`` of memory more than this one has.

    Args:
        fn: returns the exit code.
        log: takes all that it writes.
        seconds: after which it is killed, its children with it.
        more_bytes: limit on memory beyond what is in use.
    """
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
            resource.setrlimit(resource.RLIMIT_DATA, (used + more_bytes, used + more_bytes))
            torch.set_num_threads(
                1
            )  # OpenMP's other threads, if this process had some, are not in the fork: it would wait for them
            try:
                code = fn()
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1 if left.code else 0
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    status: int | None = None
    while status is None and time.monotonic() - started < seconds:
        done, value = os.waitpid(pid, os.WNOHANG)
        status = value if done else None
        if status is None:
            time.sleep(0.003)
    took = time.monotonic() - started
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it left running too
    if status is None:
        os.waitpid(pid, 0)
    ended = None if status is None else os.waitstatus_to_exitcode(status)
    return Outcome(code=ended, output=log.read_text(errors="replace") if log.exists() else "", seconds=took)
