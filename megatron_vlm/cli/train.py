"""`megatron-vlm train`: YAML, overrides and flags -> RunConfig -> Trainer."""

import os
from collections.abc import Sequence
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.log import get_logger, setup_logging
from megatron_vlm.options.arguments import Request, read_request
from megatron_vlm.options.flags import flags_help, parse_flags
from megatron_vlm.options.recipes import load_config
from megatron_vlm.parallel.grid import replicas
from megatron_vlm.registry import FamilySpec

USAGE = """usage: megatron-vlm train [--config FILE] [section.key=value ...] [--flag VALUE ...]

Runs alone on one process, or under torchrun. Sections: model, data, parallel, optimizer, training,
peft, checkpoint, logging, evaluate.
A later setting wins. Exit code: 0 done, 1 error, 143 saved and stopped by SIGTERM or SIGUSR1.

"""


def resolve(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Returns the RunConfig that a command line asks for, and lines about flags without effect.

    Raises:
        ConfigError: what is wrong, by name.
    """
    parsed = parse_flags(argv)
    file = load_config(parsed.config) if parsed.config else {}
    request = read_request(file, parsed.settings, parsed.notes, command="train")
    refusal = request.sharding.refusal(adapts=request.adapts)
    if refusal is not None:
        raise ConfigError(refusal)
    hf_config, spec = _model_of(request) if request.needs_model else ({}, None)
    completed = request.complete(hf_config, spec, _replicas(request))
    from megatron_vlm.training.run_config import RunConfig  # imports megatron-core: seconds

    config = RunConfig.from_dict(completed.run)
    trained = {os.path.realpath(item if isinstance(item, str) else item.path) for item in config.data.train}
    both = trained & {os.path.realpath(path) for path in config.data.valid}
    notes = [f"data.valid names {path}, which is trained on: its loss is not that of held-out data" for path in both]
    return config, [*completed.notes, *config.default_notes(completed.run), *notes]


def _model_of(request: Request) -> tuple[dict[str, Any], FamilySpec]:
    """config.json and family of the model that a run starts from."""
    from megatron_vlm.conversion.open_source import open_source

    load = (request.run.get("checkpoint") or {}).get("load")
    if load is None:
        raise ConfigError("no model is named: --model_name_or_path DIR (or --load)")
    with open_source(load, (request.run.get("model") or {}).get("family")) as source:
        return source.hf_config, source.spec


def _replicas(request: Request) -> int:
    """Data parallel replicas of this start: ranks by tp x pp; at least 1, as RunConfig tells what does not divide."""
    parallel, training = (request.run.get(name) or {} for name in ("parallel", "training"))
    assumed = str(training.get("dry_run_world_size") or "") if training.get("dry_run") else ""
    world = int(assumed) if assumed.isdecimal() else max(int(os.environ.get("WORLD_SIZE", "1")), 1)
    return replicas(parallel, world)


def run(argv: Sequence[str]) -> int:
    """Trains, evaluates or dry-runs; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(USAGE + flags_help())
        return 0
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost connection are pages of C++ frames
    from megatron_vlm.parallel.heartbeat import Heartbeat

    with Heartbeat() as heartbeat:  # before all that may take long: the others see that this rank lives
        return _run(argv, heartbeat)


def _run(argv: Sequence[str], heartbeat: Any) -> int:
    config, notes = resolve(argv)
    setup_logging()
    for note in notes:
        get_logger(__name__).info(note)
    if config.training.dry_run:
        from megatron_vlm.training.memory.dry_run import dry_run

        print(dry_run(config))
        return 0
    from megatron_vlm.training.trainer import Trainer

    trainer = Trainer(config, heartbeat)
    try:
        return trainer.train()
    finally:
        trainer.close()
