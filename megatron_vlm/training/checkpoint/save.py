"""Saving a training checkpoint that any (tp, pp, dp) and any kind of optimizer can load.

model, optimizer --collect--> Content --RankFile.write--> rankR in iter_N.tmp-x/ --checkpoint_write.finish--> iter_N/
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.errors import CheckpointError
from megatron_vlm.log import get_logger
from megatron_vlm.models.built import Model
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.training.checkpoint.best import Best
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.tensors import owned
from megatron_vlm.training.checkpoint.together import checkpoint_work, from_rank_0, gather
from megatron_vlm.training.optimizer.state import scaler_state
from megatron_vlm.weights import checkpoint_dir, checkpoint_write
from megatron_vlm.weights.model_folder import CarriedFiles
from megatron_vlm.weights.rank_files import RankFile, rank_file_name

log = get_logger(__name__)

_MARGIN_BYTES = 16 << 20
"""Room for headers, state.json and the HF files."""


@dataclass(frozen=True, kw_only=True)
class PeftRecord:
    """What a checkpoint of adapters says of itself.

    Attributes:
        config: with targets, ranks and scales of its own where the run goes on from an adapter.
        base: record of the base (peft/base_identity.py).
    """

    config: PeftConfig
    base: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run comes from: its checkpoints carry it or name it, and keep it.

    Attributes:
        hf_files: HF files of the model, which are carried along; None on ranks that write none.
        loaded_from: the checkpoint that it went on from.
        peft: of its adapters; None: it trains the model itself.
        best: which checkpoint is, where ``checkpoint.keep_best`` asks, on rank 0; it grows with the run.
    """

    hf_files: CarriedFiles | None = None
    loaded_from: Path | None = None
    peft: PeftRecord | None = None
    best: Best | None = None

    @property
    def protected(self) -> list[Path]:
        """Folders that are never removed."""
        paths = (self.loaded_from, self.peft.base["path"] if self.peft else None)
        return [Path(path) for path in paths if path]

    def finished(self, iteration: int) -> None:
        """Told of a save that is whole."""
        if self.best is not None:
            self.best.saved(iteration)

    @property
    def facts(self) -> dict[str, Any]:
        """Of state.json."""
        return {"peft": {"config": self.peft.config.to_dict(), "base": self.peft.base}} if self.peft else {}


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a save writes.

    Attributes:
        root: ``checkpoint.save``.
        iteration: of the checkpoint.
        file: of this rank.
        num_bytes: of all ranks' tensors.
        facts: of the manifest.
        state: of state.json.
    """

    root: Path
    iteration: int
    file: RankFile
    num_bytes: int
    facts: dict[str, Any]
    state: dict[str, Any]

    @property
    def rank(self) -> int:
        return self.file.place["rank"]

    @property
    def final(self) -> Path:
        """Folder that it becomes."""
        return self.root / checkpoint_dir.folder_name(self.iteration)

    def place(self, config: CheckpointConfig) -> str:
        """Where it goes, for messages."""
        return f"{config.url}/{self.final.name}" if config.url else str(self.final)

    @property
    def what(self) -> str:
        """For messages."""
        return f"saving iteration {self.iteration} to {self.root}"


def save_checkpoint(
    config: CheckpointConfig, model: Model, optimizer: Any, state: dict[str, Any], origin: Origin
) -> Path:
    """Writes ``iter_NNNNNNN`` into ``config.save`` and removes old checkpoints as ``config.keep_last`` says.

    A collective of the whole job: a failure on one rank is raised on all of them.

    Args:
        config: where and what.
        model: wrapped; its ``saved`` is written.
        optimizer: megatron-core's.
        state: JSON data, the same on all ranks: ``iteration`` (updates done), other counters, data state, seeds, resolved config.
        origin: of the run.

    Returns:
        The new folder.

    Raises:
        CheckpointError: on every rank; earlier checkpoints are untouched.
    """
    device = model.device
    content = collect(config, model, optimizer, state, origin)
    folder = open_folder(config, content, device)
    try:
        with checkpoint_work(content.what, device), torch.no_grad():
            record = content.file.write(folder)
        records = gather(record)
        with checkpoint_work(content.what, device):
            if content.rank == 0:
                checkpoint_write.finish(*finishing(config, content, records, origin, folder))
    except Exception:
        if content.rank == 0:
            checkpoint_write.discard(folder)
        raise
    log.info("saved %s (%.2f GB)", content.place(config), content.num_bytes / 1e9)
    origin.finished(content.iteration)
    return content.final


def collect(config: CheckpointConfig, model: Model, optimizer: Any, state: dict[str, Any], origin: Origin) -> Content:
    """What ``save_checkpoint`` writes, as views of the live tensors. A collective; the arguments are the same.

    Raises:
        CheckpointError: on every rank.
    """
    if config.folder is None:
        raise CheckpointError(
            "checkpoint.save is not set, so there is no place for a checkpoint: name a folder (--save)"
        )
    topology, iteration, save_optim = model.topology, state["iteration"], not config.no_save_optim
    root = config.folder
    with checkpoint_work(f"saving iteration {iteration} to {root}", topology.device), torch.no_grad():
        pieces, tensors = owned(model, optimizer if save_optim else None)
    place = {"rank": topology.rank, "world_size": topology.world_size, "tp": topology.tp, "tp_rank": topology.tp_rank}
    file = RankFile(place=place, pieces=pieces, tensors=tensors)
    facts = {"iteration": iteration, "layout": topology.name(), "optimizer": save_optim}
    scaler = scaler_state(optimizer) if save_optim else None
    return Content(
        root=root,
        iteration=iteration,
        file=file,
        num_bytes=sum(gather(file.num_bytes)),
        facts={**facts, "versions": _versions()},
        state={**facts, "loss_scale": scaler, "run": state, **origin.facts},
    )


def open_folder(config: CheckpointConfig, content: Content, device: torch.device) -> Path:
    """Makes the temporary folder that all ranks write to. A collective.

    Raises:
        CheckpointError: on every rank: it cannot be made, or the disk is too small.
    """
    temporary: Path | None = None
    with checkpoint_work(content.what, device):
        if content.rank == 0:
            temporary = checkpoint_write.begin(content.root, content.iteration, content.num_bytes + _MARGIN_BYTES)
    return Path(from_rank_0(str(temporary)))


def finishing(
    config: CheckpointConfig, content: Content, records: list[dict[str, Any]], origin: Origin, folder: Path
) -> tuple[Any, ...]:
    """Arguments of ``checkpoint_write.finish``, on rank 0.

    Args:
        config: what is kept.
        content: what was written.
        records: of the rank files, by rank.
        origin: of the run.
        folder: temporary, with the rank files in it.
    """
    named = {rank_file_name(writer): record for writer, record in enumerate(records)}
    best = origin.best.record(content.iteration) if origin.best is not None else None
    kept = (config.keep_last, origin.protected, config.url, best)
    return folder, named, content.facts, content.state, origin.hf_files, *kept


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
