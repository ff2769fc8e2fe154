"""Finding and loading a training checkpoint, whatever layout and kind of optimizer wrote it.

find_checkpoint (verified, agreed on by all ranks) --RankFiles, fill--> model, optimizer

Every function here is a collective of the whole job: a failure on one rank is raised on all of them.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import read_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.built import Model
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.tensors import fill
from megatron_vlm.training.checkpoint.together import checkpoint_work, from_rank_0, gather
from megatron_vlm.training.optimizer.state import restore_scaler
from megatron_vlm.weights import checkpoint_dir
from megatron_vlm.weights.mapping import group_of
from megatron_vlm.weights.rank_files import RankFiles

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        folder: holds rank files, ``hf/``, manifest and state.
        iteration: to go on at; 0 where only the weights are taken.
        state: what ``save_checkpoint`` was given.
        scaler: dynamic loss scale, or None.
        layout: layout of the run that wrote it, in words.
        weights_only: ``--finetune``, or a ``release``: nothing but weights is to be taken from it.
        peft: it holds adapters alone: their ``config`` and ``base``; None: it holds the whole model.
    """

    folder: Path
    iteration: int
    state: dict[str, Any]
    scaler: dict[str, float] | None
    layout: str
    weights_only: bool
    peft: dict[str, Any] | None = None

    @property
    def hf_dir(self) -> Path:
        return self.folder / "hf"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a load kept and what it reset, in parameters over all ranks by group (llm, vision, connector).

    Attributes:
        folder: what was loaded.
        layouts: (of the checkpoint, of this run).
        weights: parameters loaded.
        kept: optimizer state taken over: main parameters, moments and Adam's step.
        reset: trained now, but without stored state (newly unfrozen, or states left behind): zero moments, step 0.
        dropped: state stored, but the parameter is frozen now.
        loss_scale: the dynamic loss scale was taken over.
    """

    folder: Path
    layouts: tuple[str, str]
    weights: dict[str, int]
    kept: dict[str, int]
    reset: dict[str, int]
    dropped: dict[str, int]
    loss_scale: bool

    def __str__(self) -> str:
        rows = {
            "weights loaded": self.weights,
            "optimizer state kept": self.kept,
            "optimizer state reset (zero moments, Adam step 0)": self.reset,
            "optimizer state dropped (frozen now)": self.dropped,
        }
        lines = [f"loaded {self.folder}, written with {self.layouts[0]}, into {self.layouts[1]}"]
        for title, counts in rows.items():
            if counts:
                lines.append(f"  {title}: " + ", ".join(f"{group} {count}" for group, count in counts.items()))
        lines.append(f"  loss scale: {'kept' if self.loss_scale else 'none, or reset'}")
        return "\n".join(lines)


def find_checkpoint(config: CheckpointConfig, device: torch.device) -> Checkpoint | None:
    """Finds and verifies what ``config.load`` means; None where that is no training checkpoint (HF, Megatron weights).

    The newest sound one: a damaged one is passed over, and a tracker that names another is told of. An iteration that was
    named (``ckpt_step``, or ``load`` being its folder) is taken or refused. The ranks share the hashing among them.

    Args:
        config: ``load``, ``ckpt_step``, ``finetune`` and ``verify_hashes`` are read.
        device: of this rank, for the collectives.

    Raises:
        CheckpointError: on every rank: the named one, or every one, is damaged.
    """
    if config.load is None:
        return None
    path, rank, ckpt_step = Path(config.load), dist.get_rank(), config.ckpt_step
    found: checkpoint_dir.Candidates | None = None
    with checkpoint_work(f"looking for a checkpoint in {path}", device):
        if rank == 0:
            found = checkpoint_dir.candidates(path, ckpt_step)
    found = from_rank_0(found)
    if found is None:
        if ckpt_step is not None:
            raise CheckpointError(f"{path} holds no training checkpoint, so there is no --ckpt-step {ckpt_step}")
        return None

    def state_of(folder: Path) -> dict[str, Any]:
        with checkpoint_work(str(folder), device):
            checkpoint_dir.verify(folder, share=rank, shares=dist.get_world_size(), hashes=config.verify_hashes)
        with checkpoint_work(str(folder), device):
            return read_json(folder / checkpoint_dir.STATE, CheckpointError)

    folder, state = found.choose(state_of, tell=rank == 0)
    weights_only = config.finetune or folder.name == checkpoint_dir.RELEASE
    return Checkpoint(
        folder=folder,
        iteration=0 if weights_only else state["iteration"],
        state=state["run"],
        scaler=state["loss_scale"],
        layout=state["layout"],
        weights_only=weights_only,
        peft=state.get("peft"),
    )


def load_checkpoint(config: CheckpointConfig, found: Checkpoint, model: Model, optimizer: Any) -> LoadReport:
    """Fills parameters and, unless ``no_load_optim`` or ``finetune`` says otherwise, the optimizer.

    A parameter that is trained now but has no stored state starts with its weight as main parameter, zero moments and
    Adam step 0. ``finetune`` takes main parameters as weights. Learning rates and weight decay are not stored here; they
    come from the config and the schedule.

    Args:
        config: ``no_load_optim`` is read; main parameters are then the stored weights, and the optimizer has no state.
        found: from ``find_checkpoint``.
        model: wrapped or not; its ``saved`` is what the checkpoint must hold.
        optimizer: megatron-core's; None: weights only, for evaluation.

    Raises:
        CheckpointError: on every rank: tensors missing, unexpected or of another shape, all listed.
    """
    topology = model.topology
    with_state = optimizer is not None and not (found.weights_only or config.no_load_optim)
    with (
        checkpoint_work(f"loading {found.folder}", topology.device),
        RankFiles(found.folder) as files,
        torch.no_grad(),
    ):
        with_main = with_state or found.weights_only
        fate = fill(files, model, optimizer, with_state=with_state, with_main=with_main)
        loss_scale = with_state and restore_scaler(optimizer, found.scaler)
    merged = {name: kind for one in gather(fate) for name, kind in sorted(one.items())}

    def count(kind: str | None = None) -> dict[str, int]:
        return dict(Counter(group_of(name) for name, its in merged.items() if kind in (None, its)))

    report = LoadReport(
        folder=found.folder,
        layouts=(found.layout, topology.name()),
        weights=count(),
        kept=count("kept"),
        reset=count("reset"),
        dropped=count("dropped"),
        loss_scale=loss_scale,
    )
    log.info("%s", report)
    return report
