"""Which device a rank runs on."""

import os

import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel import cpu


def start_device(kind: str) -> torch.device:
    """Picks this rank's device of a ``kind`` (cpu or cuda); on the CPU, installs megatron-core's seams.

    Raises:
        ConfigError: more ranks on this node than GPUs.
    """
    if kind == "cpu":
        cpu.install()
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(f"local rank {local} has no GPU: this node has {count}, start at most that many ranks on it")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
