"""How many decoder layers each pipeline stage holds: a pure function, for files and for ranks alike.

    layers, stages, what stages hold beside layers --spread--> layers of each stage

The step of a pipeline takes as long as its slowest stage lets it (1F1B: (microbatches - 1) x slowest + one of each), so the
largest load is made as small as can be. Layers cost the same each: giving them one by one to the stage with the least load is
the best there is.
"""

from collections.abc import Sequence


def spread_virtual(
    num_layers: int, beside: Sequence[float], layer: float, virtual: int, first: int = 0
) -> tuple[int, ...]:
    """Layers of each of ``virtual`` stages a rank, in order: ranks as of ``spread``, and each rank's stages likewise.

    The first stage has at least ``first``, which other stages are weighed against as what it holds beside layers.
    """
    held = [beside[0] + first * layer, *beside[1:]]
    chunks = []
    for rank, count in enumerate(spread(num_layers - first, held, layer)):
        own = [0.0] * virtual
        own[0 if rank == 0 else -1] += held[rank]
        chunks.append(spread(count, own, layer))
    chunks[0] = (chunks[0][0] + first, *chunks[0][1:])
    return tuple(counts[chunk] for chunk in range(virtual) for counts in chunks)


def spread(num_layers: int, beside: Sequence[float], layer: float = 1.0) -> tuple[int, ...]:
    """Layers of each stage.

    Args:
        num_layers: of the decoder.
        beside: work of each stage beside its layers (tower and connector on the first, head and loss on the last).
        layer: work of a layer, in the same unit.

    Returns:
        One number a stage, 0 allowed. Where loads are equal, stages in the middle get a layer first, the first stage last.
    """
    counts, last = [0] * len(beside), len(beside) - 1
    for _ in range(num_layers):
        stage = min(range(len(beside)), key=lambda s: (beside[s] + (counts[s] + 1) * layer, s == 0, s == last, s))
        counts[stage] += 1
    return tuple(counts)
