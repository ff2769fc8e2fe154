"""Command line of `megatron-vlm train`, or the resolved file that `launch` wrote for its ranks -> RunConfig."""

import os
from collections.abc import Sequence
from typing import Any

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError
from megatron_vlm.options.request import Request, read_command
from megatron_vlm.parallel.grid import replicas
from megatron_vlm.registry import FamilySpec
from megatron_vlm.training.run_config import RunConfig


def resolve(argv: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Returns the run that a command line asks for, and lines about flags without effect.

    Raises:
        ConfigError: what is wrong, by name.
    """
    request = read_command(argv, "train")
    hf_config, spec = _model_of(request) if request.needs_model else ({}, None)
    completed = request.complete(hf_config, spec, _replicas(request), keep_sharding=True)
    config = RunConfig.from_dict(completed.run)
    trained = {os.path.realpath(item if isinstance(item, str) else item.path) for item in config.data.train}
    both = trained & {os.path.realpath(path) for path in config.data.valid}
    notes = [f"data.valid names {path}, which is trained on: its loss is not that of held-out data" for path in both]
    return config, [*completed.notes, *config.default_notes(completed.run), *notes]


def _model_of(request: Request) -> tuple[dict[str, Any], FamilySpec]:
    """config.json and family of the model that a run starts from."""
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
