"""A run that starts from parts: a language model, a vision tower and, where there is one, a projector.

launch.llm, vision, projector --assemble--> OUTPUT/assembled-ID | the checkpoint that the projector is of
"""

import hashlib
import os
from pathlib import Path

from megatron_vlm import registry
from megatron_vlm.conversion.convert import hf2mg
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.log import get_logger
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.xtuner import checkpoint_of
from megatron_vlm.weights.checkpoint_dir import holds_checkpoints
from megatron_vlm.weights.hf_io import CONFIG_NAME, resolve_directory
from megatron_vlm.weights.megatron_dir import MANIFEST

log = get_logger(__name__)


def assemble(launch: LaunchConfig, family: str | None, output: Path, precision: str | None) -> str:
    """Makes the model that the parts make up, once, and returns what to load.

    A projector that is a training checkpoint of ours holds the other two parts as well: it is the model.

    Args:
        launch: ``llm`` and ``vision`` are given.
        family: that the run names; None: told by the parts.
        output: of the run.
        precision: of the run: the dtype of what is written.

    Raises:
        ConfigError, ConversionError: parts that do not fit, or no known family.
    """
    assert launch.llm is not None and launch.vision is not None
    projector = checkpoint_of(Path(launch.projector)) if launch.projector is not None else None
    if projector is not None and holds_checkpoints(projector):
        return str(projector)
    names = [os.path.realpath(part) if os.path.exists(part) else part for part in (launch.llm, launch.vision)]
    words = "\n".join((*names, str(projector and projector.resolve()), str(precision)))
    folder = output / f"assembled-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    if not (folder / MANIFEST).exists():
        log.info("assembling %s of %s and %s", folder, launch.llm, launch.vision)
        family = family or _family_of(launch.vision, launch.llm)
        hf2mg(None, folder, family=family, llm=launch.llm, vision=launch.vision, projector=projector, dtype=precision)
    return str(folder)


def _family_of(vision: str, llm: str) -> str:
    """The family that takes such parts."""
    tower, decoder = (
        str(read_json(resolve_directory(part) / CONFIG_NAME, ConversionError).get("model_type"))
        for part in (vision, llm)
    )
    try:
        return registry.assembler(tower, decoder).name
    except ConfigError as error:
        raise ConfigError(f"{vision} and {llm}: {error}; or name a family, --family NAME") from error
