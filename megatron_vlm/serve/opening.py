"""A model to talk to, from whatever its user has of it.

model, checkpoint, adapter --open_model, open_source--> WeightSource
LLM + tower + XTuner's --llava folder --assemble--> whole model --its adapters--> MergedSource
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_vlm import registry
from megatron_vlm.conversion.convert import open_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError
from megatron_vlm.peft.adapter_folders import adapter_records, open_adapter
from megatron_vlm.peft.merge import MergedSource
from megatron_vlm.serve.config import ServedModel
from megatron_vlm.sources.source import WeightSource

_LLM_ADAPTER, _TOWER, _PROJECTOR = "llm_adapter", "visual_encoder", "projector"  # XTuner's names


@contextmanager
def open_served(model: ServedModel, verify_hashes: bool = True) -> Iterator[WeightSource]:
    """Opens a model; files that it is put together from are there until the block ends.

    Raises:
        ConversionError: no model, or parts that do not fit.
        ConfigError: parts are missing, or given twice.
    """
    with ExitStack() as stack:
        if model.llava is not None:
            yield _open_parts(model, Path(model.llava), verify_hashes, stack)
        elif model.base is not None:
            yield stack.enter_context(open_source(model.load, base=model.base, verify_hashes=verify_hashes))
        else:
            yield stack.enter_context(open_model(model.load, verify_hashes=verify_hashes))


def _open_parts(model: ServedModel, llava: Path, verify_hashes: bool, stack: ExitStack) -> WeightSource:
    vision = model.vision or llava / _TOWER
    if not (llava / _PROJECTOR).is_dir():
        raise ConfigError(f"--llava {llava} has no {_PROJECTOR}: name the folder that pth_to_hf wrote")
    if model.vision is None and not (llava / _TOWER).is_dir():
        raise ConfigError(
            f"{llava} has no {_TOWER}, as XTuner leaves out what it did not train: give --visual-encoder DIR"
        )
    adapters = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron_vlm_")))
    for folder in llava.iterdir():
        if folder.is_dir() and folder.name != _TOWER:
            (adapters / folder.name).symlink_to(folder.resolve())
    if model.llm_adapter is not None:
        if (adapters / _LLM_ADAPTER).exists():
            raise ConfigError(f"--adapter {model.llm_adapter}, and {llava} holds another ({_LLM_ADAPTER}): give one")
        (adapters / _LLM_ADAPTER).symlink_to(Path(model.llm_adapter).resolve())
    family = next(spec.name for name in registry.FAMILIES if (spec := registry.get(name)).assemble and spec.parts)
    source = stack.enter_context(
        open_model(None, family=family, llm=model.load, vision=vision, projector=llava / _PROJECTOR)
    )
    if not any(adapters.glob("*_adapter/adapter_config.json")):
        return source
    adapter, names = open_adapter(adapters, source, verify_hashes)
    records = list(adapter_records(adapters, source))
    return MergedSource(source, adapter, names, llava, None, records)
