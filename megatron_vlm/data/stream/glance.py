"""A few samples of a run's data, as its order hands them out: what a row holds in the mean, before anything is counted.

order of the first window --every n-th id--> samples --count--> COUNT_DTYPE
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.config import DataConfig, SourceConfig
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.shards.writer import MANIFEST
from megatron_vlm.data.stream.counts import COUNT_DTYPE, count_shard
from megatron_vlm.data.stream.loader import settings_of
from megatron_vlm.data.stream.mixture import Mixture, resolve
from megatron_vlm.data.types import Processor

SAMPLES = 256
"""Counted in a second or so; a mean over them is within a tenth where samples differ as in published mixtures."""


def glance(
    config: DataConfig, processor: Processor, paths: Sequence[SourceConfig | str | Path], seed: int
) -> NDArray[Any] | None:
    """Counts (``COUNT_DTYPE``) of at most ``SAMPLES`` samples that can be used, shares of sources as in training; None where a
    folder is not built yet.

    The same on every machine: a pure function of data, settings and ``seed``.

    Raises:
        DataError, ConfigError: the folders cannot be read.
    """
    settings = settings_of(paths)
    if not all(os.path.isfile(Path(setting.path, MANIFEST)) for setting in settings):
        return None
    dataset = Dataset([setting.path for setting in settings])
    try:
        mixture = Mixture(
            resolve(dataset.folders, settings),
            seed=seed,
            window=config.packing_window,
            slice_size=config.slice_size,
            window_slices=config.window_slices,
        )
        ids = mixture.ids(0, 0)
        ids = ids[np.linspace(0, len(ids) - 1, min(SAMPLES, len(ids))).astype(np.int64)]
        shards, rows = dataset.locate(ids)
        counts = [count_shard(dataset, shard, processor, rows[shards == shard]) for shard in np.unique(shards).tolist()]
    finally:
        dataset.close()
    found = np.concatenate(counts) if counts else np.empty(0, dtype=COUNT_DTYPE)
    return found[found["reason"] == 0]
