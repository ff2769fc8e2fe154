"""What a machine trains on. No GPU is touched: its memory is asked of the driver's own tool."""

import os
import subprocess
from dataclasses import dataclass
from typing import Literal

import psutil

from megatron_vlm.launch.checks import GIB, Report

_BF16_CAPABILITY = 8.0


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What one machine trains on; sizes in bytes of one rank.

    Attributes:
        kind: cpu or cuda.
        ranks: processes to start here.
        names: GPUs in use, as CUDA_VISIBLE_DEVICES names them; empty on the CPU.
        memory: that a rank can have, as free now.
        total: of the device (the machine's share on the CPU).
        text: in words.
    """

    kind: Literal["cpu", "cuda"]
    ranks: int
    names: tuple[str, ...]
    memory: int
    total: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as the driver tells of it; sizes in bytes."""

    index: str
    uuid: str
    name: str
    total: int
    free: int
    capability: float


def list_gpus() -> list[Gpu]:
    """The GPUs of this machine, asked of nvidia-smi; none where it is absent or finds none."""
    fields = "index,uuid,name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        index, uuid, name, total, free, capability = (part.strip() for part in line.split(","))
        sizes = dict(total=int(float(total)) << 20, free=int(float(free)) << 20)
        gpus.append(Gpu(index=index, uuid=uuid, name=name, capability=float(capability), **sizes))
    return gpus


def check_devices(
    report: Report,
    *,
    device: str | None,
    precision: str,
    visible: str | None,
    ranks: int | None,
    single: bool,
    memory_gib: float | None,
) -> Devices | None:
    """Picks the devices of this machine.

    Args:
        report: gets the findings.
        device: ``training.device``; None: GPUs.
        precision: ``training.precision``.
        visible: GPUs to use, as CUDA_VISIBLE_DEVICES names them; None: that variable, else all.
        ranks: processes wished for; None: one a GPU, one on the CPU.
        single: one process.
        memory_gib: memory of a device to plan for; None: as found.
    """
    ranks = 1 if single else ranks
    if device == "cpu":
        ranks = ranks or 1
        free, total = (getattr(psutil.virtual_memory(), name) // ranks for name in ("available", "total"))
        free = int(memory_gib * GIB) if memory_gib else free
        text = f"CPU, {ranks} process{'es' if ranks > 1 else ''} with {free / GIB:.1f} GiB of memory each"
        report.ok("devices", text)
        return Devices(kind="cpu", ranks=ranks, names=(), memory=free, total=total, text=text)
    found = list_gpus()
    asked = visible if visible is not None else os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = found if asked is None else _selected(found, asked)
    if gpus is None:
        there = ", ".join(gpu.index for gpu in found) or "none"
        report.fail(
            "devices", f"GPUs {asked!r} are asked for, this machine has {there}", "correct --cuda_visible_devices"
        )
        return None
    if not gpus:
        hint = "" if asked is None else f" (CUDA_VISIBLE_DEVICES is {asked!r})"
        text = f"no GPU: nvidia-smi finds none{hint}"
        report.fail("devices", text, "check driver and container (nvidia-smi), or set --device cpu to train on the CPU")
        return None
    ranks = ranks or len(gpus)
    if ranks > len(gpus):
        report.fail("devices", f"{ranks} processes for {len(gpus)} GPUs", f"set --num_processes {len(gpus)}, or less")
        return None
    gpus = gpus[:ranks]
    old = [gpu for gpu in gpus if gpu.capability < _BF16_CAPABILITY]
    if precision == "bf16" and old:
        text = f"GPU {old[0].index} ({old[0].name}, compute capability {old[0].capability}) has no bf16"
        report.fail("devices", text, "set --bf16 False --fp16 True")
        return None
    busy = [gpu for gpu in gpus if gpu.free < 0.9 * gpu.total]
    for gpu in busy:
        text = f"GPU {gpu.index} has {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free: others use it"
        report.warn("devices", text, "see nvidia-smi; the layout is chosen for what is free")
    free, total = min(gpu.free for gpu in gpus), min(gpu.total for gpu in gpus)
    free = int(memory_gib * GIB) if memory_gib else free
    text = f"{ranks} x {gpus[0].name}, {free / GIB:.1f} GiB each, {precision}"
    report.ok("devices", text)
    names = tuple(gpu.index for gpu in gpus) if asked is None else tuple(_words(asked)[:ranks])
    return Devices(kind="cuda", ranks=ranks, names=names, memory=free, total=total, text=text)


def _words(asked: str) -> list[str]:
    return [word.strip() for word in asked.split(",") if word.strip()]


def _selected(gpus: list[Gpu], asked: str) -> list[Gpu] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, by number or start of the UUID; None: one of them is not there."""
    chosen = []
    for word in _words(asked):
        if word == "-1":
            break
        match = [gpu for gpu in gpus if gpu.index == word or (not word.isdecimal() and gpu.uuid.startswith(word))]
        if not match:
            return None
        chosen.append(match[0])
    return chosen
