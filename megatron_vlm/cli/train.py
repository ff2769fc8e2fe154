"""`megatron-vlm train`: YAML, overrides and flags -> RunConfig -> Trainer."""

import os
from collections.abc import Sequence

from megatron_vlm.cli import launch
from megatron_vlm.log import get_logger, setup_logging
from megatron_vlm.options.flags import flags_help, names_config
from megatron_vlm.parallel.heartbeat import Heartbeat

USAGE = """usage: megatron-vlm train [--config FILE] [section.key=value ...] [--flag VALUE ...]

Runs alone on one process, or under torchrun. `train CONFIG ...` is `launch CONFIG ...`, as XTuner has it.
Sections: model, data, parallel, optimizer, training,
peft, checkpoint, logging, evaluate.
A later setting wins. Exit code: 0 done, 1 error, 143 saved and stopped by Ctrl-C, SIGTERM or SIGUSR1;
a second Ctrl-C stops at once.

"""


def run(argv: Sequence[str]) -> int:
    """Trains, evaluates or dry-runs; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(USAGE + flags_help())
        return 0
    if names_config(argv):
        return launch.run(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost connection are pages of C++ frames
    with Heartbeat() as heartbeat:  # before all that may take long: the others see that this rank lives
        from megatron_vlm.options.resolve import resolve  # torch
        from megatron_vlm.training.memory.dry_run import dry_run  # torch
        from megatron_vlm.training.trainer import Trainer  # megatron-core

        config, notes = resolve(argv)
        setup_logging()
        for note in notes:
            get_logger(__name__).info(note)
        if config.training.dry_run:
            print(dry_run(config))
            return 0
        trainer = Trainer(config, heartbeat)
        try:
            return trainer.train()
        finally:
            trainer.close()
