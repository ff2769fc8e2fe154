"""``toolkits/convert``: parse, call the library, print errors without a traceback."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.cli.paths import PathArgument, add_verify_hashes
from megatron_vlm.config import apply_overrides
from megatron_vlm.errors import ConfigError
from megatron_vlm.log import get_logger, setup_logging


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``hf2mg``, ``mg2hf``, ``merge``, ``pth2hf`` and ``verify``; each sets ``run(args) -> exit code``."""
    _add_hf2mg(commands)
    parser = commands.add_parser("mg2hf", help="Megatron weights or a training checkpoint -> Hugging Face directory")
    parser.add_argument(
        "--load",
        required=True,
        metavar="DIR",
        action=PathArgument,
        help="Megatron weights, a training checkpoint or one iter_ folder",
    )
    parser.add_argument("--out", required=True, metavar="DIR", action=PathArgument, help="absent or an empty directory")
    parser.add_argument("--family", help="checked against what --load holds (default: taken from it)")
    _add_output(parser)
    adapter = parser.add_argument_group("adapters (a checkpoint of a run with peft settings, or an adapter's folder)")
    adapter.add_argument("--adapter-only", action="store_true", help="write the adapter, for PEFT")
    adapter.add_argument("--merge", action="store_true", help="write the model with the adapter merged into its base")
    adapter.add_argument(
        "--base",
        metavar="DIR",
        action=PathArgument,
        help="the base, where it has moved; with --adapter-only, what is named as the base",
    )
    parser.set_defaults(run=_run_mg2hf)
    parser = commands.add_parser("merge", help="a model and an adapter of it -> the merged Hugging Face directory")
    parser.add_argument(
        "--base", required=True, metavar="DIR", action=PathArgument, help="the model that the adapter was trained on"
    )
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="DIR",
        action=PathArgument,
        help="PEFT's folder, or XTuner's with its adapters",
    )
    parser.add_argument("--out", required=True, metavar="DIR", action=PathArgument, help="absent or an empty directory")
    _add_output(parser)
    parser.set_defaults(run=_run_merge)
    parser = commands.add_parser(
        "pth2hf",
        aliases=["pth_to_hf"],
        help="XTuner's step after training: a checkpoint -> adapters and projector, or the whole model, in XTuner's folders",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="[CONFIG] CHECKPOINT OUT",
        action=PathArgument,
        help="XTuner's order; its config is not needed, as a checkpoint knows its model",
    )
    parser.add_argument(
        "--base", metavar="DIR", action=PathArgument, help="with adapters: the model that is named as their base"
    )
    _add_dtype(parser)
    add_verify_hashes(parser)
    parser.set_defaults(run=_run_pth2hf)
    _add_verify(commands)


def _add_output(parser: argparse.ArgumentParser) -> None:
    _add_dtype(parser)
    add_verify_hashes(parser)
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest safetensors file (default: 5GB)"
    )
    parser.add_argument(
        "--as",
        dest="naming",
        metavar="LAYOUT",
        help="another of the family's Hugging Face layouts (default: the one the model came in)",
    )


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "verify", help="is --load the model of --hf, and does it compute the same? exit code 0 or 1"
    )
    parser.add_argument("--hf", required=True, metavar="DIR", action=PathArgument, help="the Hugging Face model")
    parser.add_argument(
        "--load",
        required=True,
        metavar="DIR",
        action=PathArgument,
        help="Megatron weights of any tp and pp, a training checkpoint or an export",
    )
    parser.add_argument("--family", help="checked against both (default: told by the files)")
    parser.add_argument(
        "--level",
        choices=("weights", "forward", "full"),
        help="how much to compare (default: the highest that fits in memory)",
    )
    parser.set_defaults(run=_run_verify)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    help_text = "dtype of the written tensors (default: each keeps its own)"
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help=help_text)


def _add_hf2mg(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("hf2mg", help="Hugging Face directory -> Megatron weights for tp x pp ranks")
    parser.add_argument("--family", help="model family (default: told by config.json)")
    source = parser.add_argument_group("source (a hub id is taken wherever a directory is)")
    source.add_argument(
        "--hf", metavar="DIR", action=PathArgument, help="a whole model; Megatron weights of another layout work too"
    )
    source.add_argument(
        "--llm", metavar="DIR", action=PathArgument, help="language model to assemble from, with --vision"
    )
    source.add_argument(
        "--vision", metavar="DIR", action=PathArgument, help="vision tower to assemble from, with --llm"
    )
    source.add_argument(
        "--projector",
        metavar="PATH",
        action=PathArgument,
        help="trained projector for them: a folder, or XTuner's .pth",
    )
    parser.add_argument("--out", required=True, metavar="DIR", action=PathArgument, help="absent or an empty directory")
    parser.add_argument(
        "--tp", "--tensor-model-parallel-size", type=int, default=1, metavar="N", help="tensor parallel size"
    )
    parser.add_argument(
        "--pp", "--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="pipeline stages"
    )
    _add_dtype(parser)
    add_verify_hashes(parser)
    quantize = parser.add_argument_group("4 bits (for QLoRA)")
    quantize.add_argument(
        "--quantize", choices=("nf4",), help="keep linears in 4 bits; --dtype is what runs compute in"
    )
    quantize.add_argument("--no-double-quant", action="store_true", help="keep the scales of 4-bit blocks in fp32")
    quantize.add_argument(
        "--quantize-groups", nargs="+", metavar="PART", help="of llm, vision, connector (default: llm)"
    )
    vocabulary = parser.add_argument_group("vocabulary (padding rows are zero and never exported)")
    vocabulary.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="pad to a multiple of N x tp (default: 128)",
    )
    vocabulary.add_argument(
        "--extra-vocab-size", type=int, default=0, metavar="N", help="rows added before that padding"
    )
    vocabulary.add_argument(
        "--end-of-utterance",
        action="store_true",
        help="add <end_of_utterance> to a vocabulary without it (the base variant): tokenizer, config, one new row",
    )
    new = parser.add_argument_group("parts that are made new (--llm and --vision)")
    new.add_argument("--seed", type=int, metavar="N", help="of everything drawn (default: 0)")
    new.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the position table in pixels, interpolated (default: the tower's)",
    )
    new.add_argument(
        "--new-rows", choices=("mean", "normal"), help="rows of added tokens (default: mean of the others)"
    )
    new.add_argument("--latents", choices=("ones", "normal"), help="the perceiver's latents (default: ones, as in HF)")
    new.add_argument(
        "--template", metavar="NAME", help="prompt format of a LLaVA (default: the one that fits the vocabulary)"
    )
    new.add_argument(
        "--perceiver", nargs="+", metavar="KEY=VALUE", help="of HF's perceiver_config, such as resampler_n_latents=64"
    )
    parser.set_defaults(run=_run_hf2mg)


def _run_hf2mg(args: argparse.Namespace) -> int:
    from megatron_vlm.conversion.convert import hf2mg

    if args.quantize is None and (args.no_double_quant or args.quantize_groups):
        raise ConfigError("--no-double-quant and --quantize-groups have no effect without --quantize nf4")
    hf2mg(
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


def _run_mg2hf(args: argparse.Namespace) -> int:
    from megatron_vlm.conversion.convert import mg2hf

    mg2hf(
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


def _run_merge(args: argparse.Namespace) -> int:
    from megatron_vlm.conversion.convert import merge

    settings = {name: getattr(args, name) for name in ("dtype", "max_shard_size", "naming", "verify_hashes")}
    merge(args.base, args.adapter, args.out, **settings)
    return 0


def _run_pth2hf(args: argparse.Namespace) -> int:
    from megatron_vlm.conversion.convert import mg2hf
    from megatron_vlm.conversion.open_source import open_source

    if len(args.paths) not in (2, 3):
        raise ConfigError(f"pth2hf takes [CONFIG] CHECKPOINT OUT, got {len(args.paths)} arguments")
    *config, load, out = args.paths
    if config:
        get_logger(__name__).info(f"{config[0]} is not read: {load} knows its model and settings")
    if not Path(load).exists():
        raise ConfigError(f"{load} does not exist: name a checkpoint of megatron-vlm, its folder or one iteration's")
    if str(load).endswith((".pth", ".pt")):
        raise ConfigError(
            f"{load} was written by XTuner: `hf2mg --llm DIR --vision DIR --projector {load}` takes its projector; pth2hf "
            "takes a checkpoint of megatron-vlm"
        )
    with open_source(load, verify_hashes=args.verify_hashes) as source:
        adapted, naming = source.kind == "adapted", "xtuner" if "xtuner" in source.spec.exports else None
    if args.base is not None and not adapted:
        raise ConfigError(f"--base {args.base}: {load} is a whole model, which has no base: leave it out")
    settings = {name: getattr(args, name) for name in ("dtype", "base", "verify_hashes")}
    mg2hf(load, out, naming=naming, adapter_only=adapted, **settings)
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    from megatron_vlm.conversion.verify import verify

    return 0 if verify(args.hf, args.load, level=args.level, family=args.family).passed else 1


def run(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code; users' errors are raised."""
    parser = argparse.ArgumentParser(
        prog="megatron-vlm convert", description="Converts weights between Hugging Face and Megatron layouts."
    )
    add_parser(parser.add_subparsers(dest="command", required=True, metavar="hf2mg | mg2hf | merge | pth2hf | verify"))
    args = parser.parse_args(argv)
    setup_logging(rank=0)
    return args.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """``megatron-vlm convert``, as toolkits/convert calls it."""
    from megatron_vlm.cli.main import main as command

    return command(["convert", *(sys.argv[1:] if argv is None else argv)])
