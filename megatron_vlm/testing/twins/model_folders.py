"""HF folders for tests of conversion: twins with the head counts of real models, and copies with something changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

# Decoder 32 and 8 kv, tower 16, perceiver 16 and 4 kv.
REAL_HEADS: dict[str, Any] = dict(
    heads=32, kv_heads=8, layers=2, vision_heads=16, vision_layers=2, vision_ffn=80, perceiver_heads=16,
    perceiver_kv_heads=4, perceiver_head_dim=8,
)  # fmt: skip
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("idefics2", dict(text="mistral", sliding_window=7)),
    "mistral_tied": ("idefics2", dict(text="mistral", tie=True)),
    "llama": ("idefics2_llama3", dict(text="llama", max_shard_size="100KB")),
    "llama_tied": ("idefics2_llama3", dict(text="llama", tie=True, dtype=torch.bfloat16)),
}


def twin_maker(folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """name of ``TWINS`` -> HF directory, written when it is first asked for, in ``folder(name)``."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = folder(name)
            write_tiny_idefics2(made[name], **TWINS[name][1], **REAL_HEADS)
        return made[name]

    return make


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of an HF directory."""
    return {name: t for shard in sorted(directory.glob("*.safetensors")) for name, t in load_file(shard).items()}


def edited(
    source: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    config: Callable[[dict[str, Any]], Any] = lambda config: None,
) -> Path:
    """A copy of an HF directory with other tensors or another config, in one file."""
    directory = tmp_path / "edited"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*safetensors*"))
    tensors = tensors_of(source)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    data = json.loads((directory / "config.json").read_text())
    config(data)
    (directory / "config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    return directory


def assert_same_model(left: Path, right: Path, files: bool = True) -> None:
    """Every tensor and, with ``files``, every other file of two HF directories is the same."""
    a, b = tensors_of(left), tensors_of(right)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    if files:
        for path in left.iterdir():
            if "safetensors" not in path.name:
                assert (right / path.name).read_bytes() == path.read_bytes(), path.name
        assert {p.name for p in left.iterdir() if "safetensors" not in p.name} == {
            p.name for p in right.iterdir() if "safetensors" not in p.name
        }
