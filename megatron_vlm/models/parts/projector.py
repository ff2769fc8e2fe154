"""The MLP projector's part of a weight map, for any family (``layers/projector.py``; ``build.py`` builds it)."""

from collections.abc import Sequence

from megatron_vlm.weights.mapping import COLUMN, ROW, Entry, direct


def projector_entries(name: str, linears: Sequence[str], norm: str | None = None) -> list[Entry]:
    """Weight map of a ``Projector``.

    Args:
        name: of the module in our model, with its dot (``connector.``).
        linears: HF names of the two linears, without ``.weight``.
        norm: HF name of the norm.
    """
    entries = []
    for kind in ("weight", "bias"):
        if norm:
            entries.append(direct(f"{name}layernorm.{kind}", f"{norm}.{kind}"))
        entries.append(direct(f"{name}mlp.linear_fc1.{kind}", f"{linears[0]}.{kind}", COLUMN))
    entries.append(direct(f"{name}mlp.linear_fc2.weight", f"{linears[1]}.weight", ROW))
    entries.append(direct(f"{name}mlp.linear_fc2.bias", f"{linears[1]}.bias"))
    return entries
