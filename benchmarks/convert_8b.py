"""Converts real Idefics2-8B shapes (random bf16 weights, 16.8 GB) both ways: peak anonymous memory, and time against ``cp``.

    python benchmarks/convert_8b.py [--dir DIR] [--tp 2] [--pp 2] [--layers N]

Needs about 3.1 times the size of the weights on one disk (52 GB); less is refused before anything is written. Each
direction runs in a child process, whose anonymous memory (RssAnon: page cache and mapped files do not count) is sampled
every 20 ms. ``cp`` copies the same bytes without reflinks, before and after. ``sync`` is part of every time; hashes, fsync
and the start of Python are part of ours. Every tensor is compared in the end. CPU seconds tell what a busy machine hides.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONFIG = {
    "architectures": ["Idefics2ForConditionalGeneration"],
    "model_type": "idefics2",
    "dtype": "bfloat16",
    "image_token_id": 32001,
    "text_config": {
        "model_type": "mistral", "vocab_size": 32003, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "pad_token_id": 0, "sliding_window": 4096,
    },
    "vision_config": {
        "model_type": "idefics2_vision", "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
    "perceiver_config": {"model_type": "idefics2_perceiver"},
    "tie_word_embeddings": False,
}  # fmt: skip
"""Of HuggingFaceM4/idefics2-8b; what is not said is transformers' default, as there."""


def noise_pieces(noise, shape: tuple[int, ...]) -> list:
    """Pieces of ``noise`` that make up a tensor of ``shape`` along its first dimension, without a copy."""
    rows, width = shape[0], math.prod(shape[1:])
    block = min(rows, len(noise) // width - 1)
    sizes = [min(block, rows - start) for start in range(0, rows, block)]
    return [noise[i * 331 % width :][: size * width].reshape(size, *shape[1:]) for i, size in enumerate(sizes)]


@dataclass(frozen=True)
class Timing:
    """Wall clock and CPU seconds of a command (``sync`` in the former), and its peak of anonymous memory in bytes."""

    seconds: float
    cpu: float
    peak: int


def main() -> int:
    """Prints the table; returns 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a new temporary directory)")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers; fewer for a quick try")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert_8b_", dir=args.dir))
    try:
        return run(work, args.tp, args.pp, args.layers)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(work: Path, tp: int, pp: int, layers: int) -> int:
    """Writes the model, converts it both ways, copies it, compares."""
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "num_hidden_layers": layers}}
    free, need = shutil.disk_usage(work).free, 3.1 * 16.8e9 * (layers + 6) / 38
    if free < need:
        raise SystemExit(
            f"{work} has {free / 1e9:.0f} GB free, this needs {need / 1e9:.0f} GB: give another disk with --dir"
        )
    size = write_model(work / "hf", config)
    print(f"wrote {size / 1e9:.2f} GB of random bf16 weights; tp {tp}, pp {pp}", flush=True)
    os.sync()
    convert = [sys.executable, str(ROOT / "toolkits" / "convert")]
    copy = ["cp", "--reflink=never", "-r", str(work / "hf"), str(work / "copy")]
    rows = {"cp + sync, before": timed(copy)}
    shutil.rmtree(work / "copy")
    layout = ["--tp", str(tp), "--pp", str(pp)]
    rows["hf2mg"] = timed([*convert, "hf2mg", "--hf", str(work / "hf"), "--out", str(work / "mg"), *layout])
    rows["mg2hf"] = timed([*convert, "mg2hf", "--load", str(work / "mg"), "--out", str(work / "back")])
    shutil.rmtree(work / "mg")
    equal = same_tensors(work / "hf", work / "back")
    shutil.rmtree(work / "back")
    os.sync()
    rows["cp + sync, after"] = timed(copy)
    copying = (rows["cp + sync, before"].seconds + rows["cp + sync, after"].seconds) / 2
    print(f"\n{'':<18}{'seconds':>9}{'MB/s':>8}{'times cp':>10}{'CPU seconds':>13}{'peak anonymous MB':>19}")
    for name, row in rows.items():
        rate, times = size / row.seconds / 1e6, row.seconds / copying
        print(f"{name:<18}{row.seconds:>9.1f}{rate:>8.0f}{times:>10.2f}{row.cpu:>13.1f}{row.peak / 1e6:>19.0f}")
    passed = equal and all(rows[n].peak < 3e9 and rows[n].seconds < 3 * copying for n in ("hf2mg", "mg2hf"))
    print(f"\nevery tensor equal after both: {equal}; under 3 GB and 3 times cp: {passed}")
    return 0 if passed else 1


def write_model(directory: Path, config: dict) -> int:
    """Random bf16 weights of every tensor of the model, sharded as ``save_pretrained`` shards; returns their bytes."""
    import torch

    from megatron_vlm.files import write_json
    from megatron_vlm.weights.hf_io import HFWriter
    from megatron_vlm.weights.mapping import TensorInfo

    from transformers import Idefics2Config, Idefics2ForConditionalGeneration  # isort: skip

    directory.mkdir()
    write_json(directory / "config.json", config)
    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(Idefics2Config.from_dict(json.loads(json.dumps(config))))
    infos = {n: TensorInfo(dtype=torch.bfloat16, shape=tuple(p.shape)) for n, p in model.named_parameters()}
    noise = torch.randint(0x3C00, 0x3F00, (1 << 25,), dtype=torch.int16).view(torch.bfloat16)  # finite numbers
    with HFWriter(directory, infos, "5GB") as writer:
        for number, (name, info) in enumerate(infos.items()):
            writer.write(name, *noise_pieces(noise[number * 977 :], info.shape))
        writer.close()
    return sum(info.nbytes for info in infos.values())


def timed(command: list[str]) -> Timing:
    """Runs a command and then ``sync``."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = 0
    child = subprocess.Popen(command)
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.02)
    os.sync()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {child.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timing(seconds=seconds, cpu=cpu, peak=peak)


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 where it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def same_tensors(left: Path, right: Path) -> bool:
    """Whether two HF directories hold the same tensors."""
    import torch

    from megatron_vlm.weights.hf_io import HFTensors

    a, b = HFTensors(left), HFTensors(right)
    if a.infos != b.infos:
        return False
    return all(torch.equal(a.read(name).view(torch.int16), b.read(name).view(torch.int16)) for name in a.infos)


if __name__ == "__main__":
    sys.exit(main())
