"""Converts real Idefics2-8B shapes (random bf16 weights, 16.8 GB) both ways: peak anonymous memory, and time against ``cp``.

    python benchmarks/convert_8b.py [--dir DIR] [--tp 2] [--pp 2] [--layers N]

Needs about 3.1 times the size of the weights on one disk (52 GB). Each direction runs in a child process, whose anonymous
memory (RssAnon: page cache and mapped files do not count) is sampled every 20 ms. ``cp`` copies the same bytes without
reflinks, and ``sync`` is part of its time. Hashes and fsync are part of ours. Every tensor is compared in the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
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
    size = write_model(work / "hf", config)
    print(f"wrote {size / 1e9:.2f} GB of random bf16 weights; tp {tp}, pp {pp}", flush=True)
    sync()
    convert = [sys.executable, str(ROOT / "toolkits" / "convert")]
    layout = ["--tp", str(tp), "--pp", str(pp)]
    rows = [("cp + sync, before", *timed(["cp", "--reflink=never", "-r", str(work / "hf"), str(work / "copy")]))]
    shutil.rmtree(work / "copy")
    sync()
    rows.append(("hf2mg", *timed([*convert, "hf2mg", "--hf", str(work / "hf"), "--out", str(work / "mg"), *layout])))
    rows.append(("mg2hf", *timed([*convert, "mg2hf", "--load", str(work / "mg"), "--out", str(work / "back")])))
    equal = same_tensors(work / "hf", work / "back")
    shutil.rmtree(work / "back")
    sync()
    rows.append(("cp + sync, after", *timed(["cp", "--reflink=never", "-r", str(work / "hf"), str(work / "copy")])))
    copying = sum(seconds for name, seconds, _ in rows if name.startswith("cp")) / 2
    print(f"\n{'':<18}{'seconds':>9}{'MB/s':>8}{'times cp':>10}{'peak anonymous MB':>19}")
    for name, seconds, peak in rows:
        print(f"{name:<18}{seconds:>9.1f}{size / seconds / 1e6:>8.0f}{seconds / copying:>10.2f}{peak / 1e6:>19.0f}")
    ours = [row for row in rows if not row[0].startswith("cp")]
    passed = equal and all(peak < 3e9 and seconds < 3 * copying for _, seconds, peak in ours)
    print(f"\nevery tensor equal after both: {equal}; under 3 GB and 3 times cp: {passed}")
    return 0 if passed else 1


def write_model(directory: Path, config: dict) -> int:
    """Random bf16 weights of every tensor of the model, sharded as ``save_pretrained`` shards; returns their bytes."""
    import torch

    from megatron_vlm.conversion.hf_io import HFWriter, write_json
    from megatron_vlm.conversion.mapping import TensorInfo

    from transformers import Idefics2Config, Idefics2ForConditionalGeneration  # isort: skip

    directory.mkdir()
    write_json(directory / "config.json", config)
    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(Idefics2Config.from_dict(json.loads(json.dumps(config))))
    infos = {n: TensorInfo(dtype=torch.bfloat16, shape=tuple(p.shape)) for n, p in model.named_parameters()}
    noise = torch.randint(
        0x3C00, 0x3F00, (1 << 24,), dtype=torch.int16
    )  # finite numbers; random enough that no disk packs them
    with HFWriter(directory, infos, "5GB") as writer:
        for number, (name, info) in enumerate(infos.items()):
            count = info.meta().numel()
            values = noise.roll(number * 977).repeat(-(-count // len(noise)))[:count]
            writer.write(name, values.view(torch.bfloat16).reshape(info.shape))
        writer.close()
    return sum(info.nbytes for info in infos.values())


def timed(command: list[str]) -> tuple[float, int]:
    """Runs a command and then ``sync``: (seconds, peak anonymous bytes)."""
    start = time.perf_counter()
    child = subprocess.Popen(command)
    peak = [0]
    watch = threading.Thread(target=sample_memory, args=(child, peak))
    watch.start()
    code = child.wait()
    sync()
    seconds = time.perf_counter() - start
    watch.join()
    if code:
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")
    return seconds, peak[0]


def sample_memory(child: subprocess.Popen, peak: list[int]) -> None:
    """Keeps the largest RssAnon of a running child in ``peak[0]``."""
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)
        time.sleep(0.02)


def same_tensors(left: Path, right: Path) -> bool:
    """Whether two HF directories hold the same tensors."""
    import torch

    from megatron_vlm.conversion.hf_io import HFTensors

    a, b = HFTensors(left), HFTensors(right)
    if a.infos != b.infos:
        return False
    return all(torch.equal(a.read(name).view(torch.int16), b.read(name).view(torch.int16)) for name in a.infos)


def sync() -> None:
    """Waits until the disk has everything."""
    os.sync()


if __name__ == "__main__":
    sys.exit(main())
