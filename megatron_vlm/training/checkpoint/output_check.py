"""What a run will write is tried before it trains: every folder on every node, whose checkpoints are there, and room for one.

start of the Trainer --check_writable--> a file of each folder, written and removed   (before the model is built)
what it starts from is known --check_kept--> no checkpoint of another run would be replaced or overtaken
model and optimizer built --check_room--> bytes of a checkpoint against what is free  (before the first step)
"""

import contextlib
import os
import shutil

import torch
import torch.distributed as dist

from megatron_vlm.errors import ConfigError
from megatron_vlm.files import trial_write
from megatron_vlm.models.built import Model
from megatron_vlm.parallel.batch import together
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.load import Checkpoint
from megatron_vlm.training.run_config import RunConfig, folders_of
from megatron_vlm.weights import remote
from megatron_vlm.weights.checkpoint_dir import TRACKER, iterations


def check_writable(config: RunConfig, device: torch.device) -> None:
    """Makes the run's folders and tries to write into each, on the first rank of every node. A collective.

    Raises:
        ConfigError: on every rank: the setting, the folder, and what the disk says.
    """
    with together(device):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for setting, folder in folders_of(config).items():
                with contextlib.suppress(OSError):  # trial_write finds the same, and says it
                    folder.mkdir(parents=True, exist_ok=True)
                trial_write(folder, setting)


def check_kept(checkpoint: CheckpointConfig, found: Checkpoint | None, start: int) -> None:
    """Refuses a folder with later checkpoints than the run starts at, unless it starts from that folder.

    They are another run's: this one would replace them, and its own, which are written last, would be taken for the newest.
    A run that goes back to an earlier iteration of its own, or takes the weights of its folder with ``finetune``, may.

    Args:
        checkpoint: where the run saves.
        found: the checkpoint that ``checkpoint.load`` means, if it is one.
        start: iteration that the run goes on at.

    Raises:
        ConfigError: naming the folder, what it holds, and what the run starts from.
    """
    save = checkpoint.folder
    if save is None or (found is not None and os.path.realpath(found.folder.parent) == os.path.realpath(save)):
        return
    there = [
        *(iterations(save) if save.is_dir() else ()),
        *(remote.iterations(checkpoint.url) if checkpoint.url else ()),
    ]
    later = sorted({number for number in there if number > start})
    if later:
        names = ", ".join(map(str, later[:5])) + (f" and {len(later) - 5} more" if len(later) > 5 else "")
        place = checkpoint.save
        known = checkpoint.url is not None or (save / TRACKER).exists()
        raise ConfigError(
            f"checkpoint.save {place} holds checkpoints of another run (iterations {names}), and this one starts at {start} "
            f"from {checkpoint.load}: it would replace them. Name another folder (--save), go on from them (--load {place}), "
            "or remove them" + ("" if known else f". Its {TRACKER} is missing; --load {place} does without")
        )


def check_room(config: RunConfig, model: Model, *, trained_only: bool) -> None:
    """Compares what a checkpoint will take, by what is built, with the free space. A collective.

    Args:
        config: where checkpoints go, and what of.
        model: one of its replicas counts.
        trained_only: checkpoints hold adapters alone.

    Raises:
        ConfigError: on every rank: too little space for one checkpoint.
    """
    checkpoint = config.checkpoint
    if checkpoint.folder is None or config.training.skip_train:
        return
    parameters = [parameter for stage in model for parameter in stage.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in (trained if trained_only else parameters))
    if not checkpoint.no_save_optim:  # two moments, and fp32 main parameters beside 16 bits
        size += sum(parameter.numel() * (8 if parameter.element_size() == 4 else 12) for parameter in trained)
    topology, device = model.topology, model.device
    total = torch.tensor([size if topology.copy_number == 0 else 0], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    with together(device):
        free = shutil.disk_usage(checkpoint.folder).free
        if dist.get_rank() == 0 and int(total) > free:
            raise ConfigError(
                f"a checkpoint takes about {int(total) / 1e9:.2f} GB, and {checkpoint.folder} has "
                f"{free / 1e9:.2f} GB free: make room or choose another folder (checkpoint.no_save_optim leaves the "
                "optimizer out)"
            )
