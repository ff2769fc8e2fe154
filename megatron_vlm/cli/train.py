"""`megatron-vlm train`: YAML, overrides and flags -> RunConfig -> Trainer."""

import warnings
from collections.abc import Sequence
from typing import Any

from megatron_vlm.cli.flags import flags_help, parse_flags
from megatron_vlm.config import load_yaml, set_dotted
from megatron_vlm.log import get_logger, setup_logging

USAGE = """usage: megatron-vlm train [--config FILE] [section.key=value ...] [--flag VALUE ...]

Runs alone on one process, or under torchrun. Sections: model, data, parallel, optimizer, training, checkpoint, logging.
A later setting wins. Exit code: 0 done, 1 error, 143 saved and stopped by SIGTERM or SIGUSR1.

"""


def resolve(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Returns the RunConfig that a command line asks for, and lines about flags without effect.

    Raises:
        ConfigError: what is wrong, by name.
    """
    parsed = parse_flags(argv)
    data = load_yaml(parsed.config) if parsed.config else {}
    for key, value in parsed.settings:
        set_dotted(data, key, value)
    from megatron_vlm.training.run_config import RunConfig  # imports megatron-core: seconds

    return RunConfig.from_dict(data), parsed.notes


def run(argv: Sequence[str]) -> int:
    """Trains, evaluates or dry-runs; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(USAGE + flags_help())
        return 0
    warnings.filterwarnings("ignore", module="megatron.core")  # it lists what is not installed, at every start
    # megatron-core 0.16.1 calls collectives by names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    config, notes = resolve(argv)
    setup_logging()
    for note in notes:
        get_logger(__name__).info(note)
    if config.training.dry_run:
        from megatron_vlm.training.dry_run import dry_run

        print(dry_run(config))
        return 0
    from megatron_vlm.training.trainer import Trainer

    trainer = Trainer(config)
    try:
        return trainer.train()
    finally:
        trainer.close()
