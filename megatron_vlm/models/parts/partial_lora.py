"""The weight map of partial LoRA's branches (``layers/partial_lora.py``)."""

from collections.abc import Sequence

from megatron_vlm.weights.mapping import COLUMN, GATED, REPLICATED, ROW, Entry, gated


def branch_entries(linear: str, hf: Sequence[str]) -> list[Entry]:
    """Weight map of the branch of one linear.

    Args:
        linear: in our model, column parallel (``linear_qkv``, ``linear_fc1``) or row parallel (``linear_proj``, ``linear_fc2``).
        hf: HF names of its factors, up to ``A.weight`` and ``B.weight``; those of the gate first where there are two.
    """
    row = linear.endswith(("linear_proj", "linear_fc2"))
    column = GATED if len(hf) > 1 else COLUMN
    return [
        gated(f"{linear}.plora.a", [f"{name}A.weight" for name in hf], ROW if row else REPLICATED),
        gated(f"{linear}.plora.b", [f"{name}B.weight" for name in hf], REPLICATED if row else column),
    ]
