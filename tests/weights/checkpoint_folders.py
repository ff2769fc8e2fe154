"""Whole checkpoints of one small file."""

from megatron_vlm.files import write_json
from megatron_vlm.weights.checkpoint_write import begin, commit


def make(root, iteration, content=b"weights", after=0):
    """A whole checkpoint with one file, which follows save ``after``."""
    folder = begin(root, iteration, 1000)
    (folder / "rank0.safetensors").write_bytes(content)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    write_json(folder / "state.json", {"run": {}})
    return commit(folder, {}, {"iteration": iteration}, after)
