"""hf2mg and mg2hf: the two directions, each one pass over the full tensors.

hf2mg: open_source (or a family's assemble) --> write_megatron
mg2hf: open_source --> export_hf
"""

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_vlm import registry
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.conversion.write_megatron import write_megatron
from megatron_vlm.errors import ConfigError, ConversionError, MegatronVLMError
from megatron_vlm.files import check_output, read_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.processing.processor_files import PIXELS, add_stops, set_pixels
from megatron_vlm.peft.export import export_adapter
from megatron_vlm.registry import FamilySpec
from megatron_vlm.sources.hf import HFSource, open_hf
from megatron_vlm.sources.quantised import quantised_names
from megatron_vlm.sources.source import WeightSource, other_naming
from megatron_vlm.weights.checkpoint_dir import STATE, holds_checkpoints
from megatron_vlm.weights.hf_io import CONFIG_NAME, HFWriter, list_names, resolve_directory, write_config
from megatron_vlm.weights.mapping import DerivedTensors, Entry, HFModel, TensorInfo
from megatron_vlm.weights.model_folder import copy_hf_files
from megatron_vlm.weights.nf4.tensor import Quantization
from megatron_vlm.weights.safetensors_io import PARAMS_DTYPES, aligned_order, atomic_directory, cast
from megatron_vlm.weights.torch_files import load_weights_only


def params_dtype(name: str | None) -> torch.dtype | None:
    """``fp32``, ``bf16``, ``fp16`` -> torch dtype; None: keep each tensor's own."""
    if name is None:
        return None
    if name not in PARAMS_DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(PARAMS_DTYPES)}")
    return PARAMS_DTYPES[name]


@contextlib.contextmanager
def open_model(
    hf: str | os.PathLike | None,
    *,
    family: str | None = None,
    llm: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    projector: str | os.PathLike | None = None,
    end_of_utterance: bool = False,
    assemble: dict[str, Any] | None = None,
    verify_hashes: bool = True,
) -> Iterator[WeightSource]:
    """Opens a whole model, or one assembled from ``llm`` and ``vision``; directories or hub ids.

    Args:
        hf: an HF model, weights of another layout, or a folder that holds the parts of a model.
        family: needed for assembling; else told by the config.
        llm, vision: parts, instead of ``hf``.
        projector: trained connector between them (see ``open_projector``).
        end_of_utterance: add ``<end_of_utterance>`` where the vocabulary lacks it.
        assemble: the family's options for new parts (seed, image_size ...).
        verify_hashes: as of ``open_source``.

    Raises:
        ConfigError: a combination that says nothing, or an option that the family does not offer.
        ConversionError: parts that do not fit.
    """
    parts = llm is not None or vision is not None
    if (hf is not None) == parts or (parts and (llm is None or vision is None)):
        raise ConfigError("give either --hf DIR, or both --llm DIR and --vision DIR to assemble a model from")
    if projector is not None and not parts:
        raise ConfigError("--projector belongs to --llm and --vision: give both")
    with tempfile.TemporaryDirectory(prefix="megatron_vlm_") as files, contextlib.ExitStack() as stack:
        if hf is not None and (found := _find_parts(hf, family)):
            family, llm, vision, projector = found
        if llm is not None and vision is not None:
            spec = _assembling(family)
            models = [open_hf(resolve_directory(part)) for part in (llm, vision)]
            models += [] if projector is None else [open_projector(projector)]
            for model in models:
                stack.callback(model.tensors.close)
            llm_model, vision_model, *more = models
            assert spec.assemble is not None
            made = spec.assemble(llm_model, vision_model, Path(files), assemble or {}, *more)
            yield HFSource(made, spec, made_from=tuple(model.directory for model in models))
            return
        assert hf is not None
        source = stack.enter_context(open_source(hf, family, verify_hashes=verify_hashes))
        if end_of_utterance:
            if not isinstance(source, HFSource) or source.spec.add_end_of_utterance is None:
                raise ConfigError(f"--end-of-utterance needs an HF model of a family with that token; {hf} is another")
            copy_hf_files(source.hf_dir, files)
            extended = source.spec.add_end_of_utterance(source.model, Path(files), assemble or {})
            source = HFSource(extended, source.spec, made_from=(source.hf_dir,))
        yield source


def _assembling(family: str | None) -> FamilySpec:
    """The family that makes a model out of parts."""
    offered = [name for name in registry.FAMILIES if registry.get(name).assemble]
    if family not in offered:
        if family is not None:
            registry.get(family)  # says so where there is no such family
        raise ConfigError(f"--llm and --vision need --family {' or '.join(offered)}, got {family}")
    return registry.get(family)


def _find_parts(hf: str | os.PathLike, family: str | None) -> tuple[str, Path, Path, Path] | None:
    """(family, llm, vision, projector) of a folder that holds them."""
    for name in registry.FAMILIES if Path(hf).is_dir() else ():
        spec = registry.get(name)
        found = spec.parts(Path(hf)) if spec.parts and family in (None, name) else None
        if found:
            return name, found["llm"], found["vision"], found["projector"]
    return None


def open_projector(path: str | os.PathLike) -> HFModel:
    """Opens a trained connector: a folder of its own or of a whole model, or a file of ``torch.save`` (XTuner's ``.pth``, LLaVA's
    ``mm_projector.bin``, what InternVL's ``--mlp_path`` reads), which is read weights-only.

    Raises:
        ConversionError: the file holds other classes, other trained parts too, or no tensors.
    """
    path = Path(path)
    if path.is_dir():
        if holds_checkpoints(path):
            raise ConversionError(
                f"--projector {path} is a training checkpoint of a whole model: `convert mg2hf --load {path} --out DIR` makes a "
                "folder that its connector can be taken of; `launch` goes on from it as it is"
            )
        return open_hf(path)
    tensors = load_weights_only(path)
    tensors = tensors.get("state_dict", tensors)
    prefix = "projector."
    others = sorted(name for name in tensors if not name.startswith(prefix))
    if others and len(others) < len(tensors):
        raise ConversionError(
            f"{path} holds {len(others)} tensors beside a projector's ({list_names(others, 3)}), which would be lost: "
            "convert it with XTuner's pth_to_hf, merge its adapters, and give the folders"
        )
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if len(own) < len(tensors):
        odd = sorted(name for name in tensors if name.removeprefix(prefix) not in own)
        raise ConversionError(
            f"{path} is no state of a projector: {list_names(odd, 3)} are no tensors; save its state_dict alone"
        )
    readers = {name: partial(torch.Tensor.contiguous, tensor) for name, tensor in own.items()}
    infos = {name: TensorInfo.of(tensor) for name, tensor in own.items()}
    return HFModel(directory=path, config={}, tensors=DerivedTensors(infos, readers))


def hf2mg(
    hf: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    family: str | None = None,
    llm: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    projector: str | os.PathLike | None = None,
    end_of_utterance: bool = False,
    assemble: dict[str, Any] | None = None,
    tp: int = 1,
    pp: int = 1,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    vocab_extra: int = 0,
    quantize: str | None = None,
    double_quant: bool = True,
    quantize_groups: Sequence[str] = ("llm",),
    verify_hashes: bool = True,
) -> None:
    """Converts a model (see ``open_model``) to Megatron weights (see ``write_megatron``).

    Args:
        quantize: None, or ``nf4``: keep linears in 4 bits, with ``double_quant``, in the parts ``quantize_groups`` (llm, vision,
            connector); their values are those of ``dtype``, or else of the dtype that they have.
    """
    parts: dict[str, Any] = dict(llm=llm, vision=vision, projector=projector, verify_hashes=verify_hashes)
    with open_model(hf, family=family, **parts, end_of_utterance=end_of_utterance, assemble=assemble) as source:
        write_megatron(
            source,
            Path(out),
            tp=tp,
            pp=pp,
            dtype=params_dtype(dtype),
            vocab_multiple=vocab_multiple,
            vocab_extra=vocab_extra,
            quantize=_quantization(source, quantize, dtype, double_quant, quantize_groups),
        )


def _quantization(
    source: WeightSource, format: str | None, dtype: str | None, double_quant: bool, groups: Sequence[str]
) -> Quantization | None:
    """What ``hf2mg --quantize`` asks for."""
    if format is None:
        return None
    settings = dict(format=format, double_quant=double_quant, groups=groups, dtype=dtype or "bf16")
    quantization = Quantization.from_dict(settings, "--quantize")
    if dtype is not None:
        return quantization
    own = {source.infos[name].dtype for name in quantised_names(source.mapping, source.infos, groups)}
    names = [name for name, known in PARAMS_DTYPES.items() if {known} == own]
    if not names:
        stored = ", ".join(sorted(str(item).removeprefix("torch.") for item in own)) or "none"
        raise ConfigError(f"--quantize: the linears are of dtype {stored}; say with --dtype what the run computes in")
    return Quantization.from_dict({**settings, "dtype": names[0]}, "--quantize")


def mg2hf(
    load: str | os.PathLike,
    out: str | os.PathLike,
    *,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    naming: str | None = None,
    adapter_only: bool = False,
    merge: bool = False,
    base: str | os.PathLike | None = None,
    verify_hashes: bool = True,
) -> None:
    """Converts Megatron weights, a training checkpoint or an HF directory to an HF directory (see ``export_hf``).

    Args:
        load, out, family, dtype, max_shard_size, naming: see there.
        adapter_only: write what LoRA trained, for PEFT (see ``export_adapter``).
        merge: write it merged into its base.
        base: where the base is (``merge``), or the HF model that is named as the base (``adapter_only``).
        verify_hashes: as of ``open_source``.

    Raises:
        ConfigError: an adapter, and not said what to do with it; or no adapter.
    """
    if adapter_only and merge:
        raise ConfigError("--adapter-only writes the adapter, --merge the merged model: give one of them")
    with _open_for(load, family, base, adapter_only, verify_hashes) as source:
        if source.kind != "adapted" and (adapter_only or merge):
            raise ConfigError(f"--{'merge' if merge else 'adapter-only'}: {load} holds a whole model, and no adapter")
        if params_dtype(dtype) == torch.float32:
            source.use_main_parameters()
        if adapter_only:
            export_adapter(source, out, base=base, naming=naming, dtype=params_dtype(dtype))
            return
        if source.kind == "adapted" and not merge:
            raise ConfigError(
                f"{load} holds an adapter: --merge writes it merged into its base, --adapter-only as it is"
            )
        export_hf(source, out, dtype=params_dtype(dtype), max_shard_size=max_shard_size, naming=naming)


def _open_for(
    load: str | os.PathLike, family: str | None, base: str | os.PathLike | None, adapter_only: bool, verify: bool
) -> WeightSource:
    """Opens what is converted; for an adapter alone with the base it was trained on, where that is still there, in full."""
    if not adapter_only or base is None:
        return open_source(load, family, base, verify_hashes=verify)
    try:
        source = open_source(load, family, verify_hashes=verify)
    except MegatronVLMError:
        return open_source(load, family, base, verify_hashes=verify)
    if source.quantization is None or not Path(base).is_dir():
        return source
    source.close()
    return open_source(load, family, base, verify_hashes=verify)


def merge(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    naming: str | None = None,
    verify_hashes: bool = True,
) -> None:
    """Merges an adapter (PEFT's folder, XTuner's folders or a checkpoint) into a model, and writes that (see ``export_hf``)."""
    settings = dict[str, Any](dtype=dtype, max_shard_size=max_shard_size, naming=naming, verify_hashes=verify_hashes)
    mg2hf(adapter, out, merge=True, base=base, **settings)


def export_hf(
    source: WeightSource,
    out: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    naming: str | None = None,
) -> None:
    """Writes a source as an HF directory: sharded safetensors with index, and every other file of the original.

    Args:
        source: any weights.
        out: absent or an empty directory.
        dtype: of the written floating point tensors; None: each keeps its own.
        max_shard_size: as of transformers' ``save_pretrained``.
        naming: another of the family's HF namings (``FamilySpec.exports``); None: the original's.

    Raises:
        ConfigError: the family has no such naming.
    """
    source.require_full("writing an HF model")
    check_output(out, source.folders(), "--out", ConversionError)
    other = other_naming(source, naming)
    entries = (source.mapping if other is None else other.mapping(source.config)).by_name()
    order = aligned_order({name: info.cast(dtype) for name, info in source.infos.items()})
    copies = {source.mapping.hf_tied[name]: name for name in source.stored_ties} if other is None else {}
    infos: dict[str, dict[str, TensorInfo]] = {}
    for name, info in order.items():
        for hf_name, part in zip(entries[name].hf, entries[name].from_full(info.meta()), strict=True):
            for written_name in filter(None, (hf_name, copies.get(hf_name))):
                folder, _, tensor = written_name.rpartition("/")
                infos.setdefault(folder, {})[tensor] = TensorInfo.of(part)
    written = [info for tensors in infos.values() for info in tensors.values()]
    changed = dtype or _changed_dtype(source, written)
    source.hash_as_read()
    with atomic_directory(out, sum(info.nbytes for info in written)) as directory, contextlib.ExitStack() as stack:
        writers = {}
        for folder, tensors in infos.items():
            (directory / folder).mkdir(exist_ok=True)
            writers[folder] = stack.enter_context(HFWriter(directory / folder, tensors, max_shard_size))
        for name in order:
            _write_parts(source, entries[name], dtype, writers, copies)
        for writer in writers.values():
            writer.close()
        source.check_digests()
        if other is None:
            copy_hf_files(source.hf_dir, directory)
            write_config(directory, source.hf_config, changed)
        else:
            other.files(source.hf_dir, copy.deepcopy(source.hf_config), directory)
            for folder in infos:
                write_config(directory / folder, read_json(directory / folder / CONFIG_NAME, ConversionError), changed)
        _end_answers(source, directory)
        set_pixels(directory, pixels_of(source))


def pixels_of(source: WeightSource) -> dict[str, int]:
    """Bounds of pixels (``PIXELS``) that the run which trained the weights set in ``data``; of a run upon a run its own."""
    states = [read_json(path) for folder in reversed(source.folders()) if (path := Path(folder, STATE)).is_file()]
    data = {k: v for state in states for k, v in ((state.get("run") or {}).get("config") or {}).get("data", {}).items()}
    return {name: data[name] for name in PIXELS if data.get(name)}


def _end_answers(source: WeightSource, directory: Path) -> None:
    """Sees that transformers ends the written model's answers where training ended them, whatever the base says or leaves out."""
    try:
        ends = source.spec.stop_ids(Path(source.hf_dir))
    except ConfigError as error:  # the weights are good, and may have been given without a tokenizer
        get_logger(__name__).warning("what ends an answer is not known, eos_token_id is that of the base: %s", error)
        return
    add_stops(directory, ends)


def _write_parts(
    source: WeightSource, entry: Entry, dtype: torch.dtype | None, writers: dict[str, HFWriter], copies: dict[str, str]
) -> None:
    for hf_name, pieces in zip(entry.hf, source.read_hf(entry), strict=True):
        pieces = [cast(piece, dtype) for piece in pieces]
        for written_name in filter(None, (hf_name, copies.get(hf_name))):
            folder, _, tensor = written_name.rpartition("/")
            writers[folder].write(tensor, *pieces)


def _changed_dtype(source: WeightSource, infos: Iterable[TensorInfo]) -> torch.dtype | None:
    """What config.json must say after training in another dtype than the original's; None: leave it alone."""
    dtypes = {info.dtype for info in infos}
    if source.kind != "training" or len(dtypes) != 1:
        return None
    only: Any = dtypes.pop()
    named = source.hf_config.get("dtype") or source.hf_config.get("torch_dtype")
    return None if named == str(only).removeprefix("torch.") else only
