"""What each command of ``megatron-vlm convert`` calls in the library, with the arguments that ``convert`` read."""

import argparse
from pathlib import Path
from typing import Any

from megatron_vlm import registry
from megatron_vlm.config import apply_overrides
from megatron_vlm.conversion import convert
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.conversion.verify import verify as compare
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.log import get_logger
from megatron_vlm.options import xtuner
from megatron_vlm.weights.hf_io import CONFIG_NAME, resolve_directory


def hf2mg(args: argparse.Namespace) -> int:
    """Hugging Face directory -> Megatron weights."""
    if args.quantize is None and (args.no_double_quant or args.quantize_groups):
        raise ConfigError("--no-double-quant and --quantize-groups have no effect without --quantize nf4")
    convert.hf2mg(
        args.hf,
        args.out,
        family=args.family,
        llm=args.llm,
        vision=args.vision,
        projector=args.projector,
        end_of_utterance=args.end_of_utterance,
        assemble=_assemble_options(args),
        tp=args.tp,
        pp=args.pp,
        dtype=args.dtype,
        vocab_multiple=args.make_vocab_size_divisible_by,
        vocab_extra=args.extra_vocab_size,
        quantize=args.quantize,
        double_quant=not args.no_double_quant,
        quantize_groups=args.quantize_groups or ("llm",),
        verify_hashes=args.verify_hashes,
    )
    return 0


def assemble(args: argparse.Namespace) -> int:
    """Vision tower + connector + language model -> Hugging Face directory."""
    tower, decoder = (
        str(read_json(resolve_directory(part) / CONFIG_NAME, ConversionError).get("model_type"))
        for part in (args.vision, args.llm)
    )
    family = registry.assembler(tower, decoder, args.connector).name
    options = _assemble_options(args)
    with convert.open_model(
        None, family=family, llm=args.llm, vision=args.vision, projector=args.projector, assemble=options
    ) as source:
        convert.export_hf(source, args.out, dtype=convert.params_dtype(args.dtype), max_shard_size=args.max_shard_size)
    return 0


def _assemble_options(args: argparse.Namespace) -> dict[str, Any]:
    """The new parts' options; refused where nothing new is made."""
    options: dict[str, Any] = {
        key: getattr(args, key) for key in ("seed", "image_size", "new_rows", "latents", "template")
    }
    options = {key: value for key, value in options.items() if value is not None}
    if args.perceiver:
        options["perceiver"] = apply_overrides({}, args.perceiver)
    usable = set(options) if args.llm else {"seed", "new_rows"} if args.end_of_utterance else set()
    if set(options) - usable:
        flags = ", ".join("--" + key.replace("_", "-") for key in sorted(set(options) - usable))
        raise ConfigError(
            f"{flags} apply to parts that are made new, with --llm and --vision, or (rows) --end-of-utterance"
        )
    return options


def mg2hf(args: argparse.Namespace) -> int:
    """Megatron weights, checkpoint or adapter -> Hugging Face directory."""
    convert.mg2hf(
        args.load,
        args.out,
        family=args.family,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        naming=args.naming,
        adapter_only=args.adapter_only,
        merge=args.merge,
        base=args.base,
        verify_hashes=args.verify_hashes,
    )
    return 0


def merge(args: argparse.Namespace) -> int:
    """Model and adapter -> merged model."""
    settings = {name: getattr(args, name) for name in ("dtype", "max_shard_size", "naming", "verify_hashes")}
    named = [args.base, args.adapter, args.out]
    if (len(args.paths), named.count(None)) not in ((3, 3), (0, 0)):
        raise ConfigError("merge takes BASE ADAPTER OUT, or --base, --adapter and --out")
    base, adapter, out = args.paths or named
    convert.merge(base, adapter, out, **settings)
    return 0


def pth2hf(args: argparse.Namespace) -> int:
    """XTuner's step after training, in its order of arguments."""
    if len(args.paths) not in (2, 3):
        raise ConfigError(f"pth2hf takes [CONFIG] CHECKPOINT OUT, got {len(args.paths)} arguments")
    *config, load, out = args.paths
    load = xtuner.checkpoint_of(Path(load))
    if not load.exists():
        raise ConfigError(f"{load} does not exist: name a checkpoint of megatron-vlm, its folder or one iteration's")
    if str(load).endswith((".pth", ".pt")):
        raise ConfigError(
            f"{load} was written by XTuner: `hf2mg --llm DIR --vision DIR --projector {load}` takes its projector; pth2hf "
            "takes a checkpoint of megatron-vlm"
        )
    base = args.base or (xtuner.base_of(str(config[0])) if config and xtuner.is_config(str(config[0])) else None)
    if config:
        named = f"names the base, {base}; else it is not read" if base and not args.base else "is not read"
        get_logger(__name__).info(f"{config[0]} {named}: {load} knows its model and settings")
    with open_source(load, verify_hashes=args.verify_hashes) as source:
        adapted, naming = source.kind == "adapted", "xtuner" if "xtuner" in source.spec.exports else None
    if args.base is not None and not adapted:
        raise ConfigError(f"--base {args.base}: {load} is a whole model, which has no base: leave it out")
    settings = {name: getattr(args, name) for name in ("dtype", "verify_hashes")}
    convert.mg2hf(load, out, naming=naming, adapter_only=adapted, base=base if adapted else None, **settings)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Exit code 0: the same model."""
    return 0 if compare(args.hf, args.load, level=args.level, family=args.family).passed else 1


COMMANDS = {
    "hf2mg": hf2mg,
    "assemble": assemble,
    "mg2hf": mg2hf,
    "merge": merge,
    "pth2hf": pth2hf,
    "pth_to_hf": pth2hf,
    "verify": verify,
}
