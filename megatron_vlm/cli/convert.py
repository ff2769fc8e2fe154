"""``toolkits/convert``: parse, call the library, print errors without a traceback."""

import argparse
import sys
from collections.abc import Sequence

from megatron_vlm.cli.arguments import add_path, add_verify_hashes
from megatron_vlm.cli.main import main as command
from megatron_vlm.log import setup_logging


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``hf2mg``, ``assemble``, ``mg2hf``, ``merge``, ``pth2hf`` and ``verify``; ``convert_commands`` runs them."""
    _add_hf2mg(commands)
    _add_assemble(commands)
    parser = commands.add_parser("mg2hf", help="Megatron weights or a training checkpoint -> Hugging Face directory")
    add_path(parser, "--load", "Megatron weights, a training checkpoint or one iter_ folder", required=True)
    add_path(parser, "--out", "absent or an empty directory", required=True)
    parser.add_argument("--family", help="checked against what --load holds (default: taken from it)")
    _add_output(parser)
    adapter = parser.add_argument_group("adapters (a checkpoint of a run with peft settings, or an adapter's folder)")
    adapter.add_argument("--adapter-only", action="store_true", help="write the adapter, for PEFT")
    adapter.add_argument("--merge", action="store_true", help="write the model with the adapter merged into its base")
    add_path(adapter, "--base", "the base, where it has moved; with --adapter-only, what is named as the base")
    parser = commands.add_parser("merge", help="a model and an adapter of it -> the merged Hugging Face directory")
    add_path(parser, "paths", "the three below, in XTuner's order", nargs="*", metavar="BASE ADAPTER OUT")
    add_path(parser, "--base", "the model that the adapter was trained on")
    add_path(parser, "--adapter", "PEFT's folder, or XTuner's with its adapters")
    add_path(parser, "--out", "absent or an empty directory")
    _add_output(parser)
    parser = commands.add_parser(
        "pth2hf",
        aliases=["pth_to_hf"],
        help="XTuner's step after training: a checkpoint -> adapters and projector, or the whole model, in XTuner's folders",
    )
    add_path(
        parser,
        "paths",
        "XTuner's order; its config is not needed, as a checkpoint knows its model",
        nargs="+",
        metavar="[CONFIG] CHECKPOINT OUT",
    )
    add_path(parser, "--base", "with adapters: the model that is named as their base")
    _add_dtype(parser)
    add_verify_hashes(parser)
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
    add_path(parser, "--hf", "the Hugging Face model", required=True)
    add_path(parser, "--load", "Megatron weights of any tp and pp, a training checkpoint or an export", required=True)
    parser.add_argument("--family", help="checked against both (default: told by the files)")
    parser.add_argument(
        "--level",
        choices=("weights", "forward", "full"),
        help="how much to compare (default: the highest that fits in memory)",
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    help_text = "dtype of the written tensors (default: each keeps its own)"
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help=help_text)


def _add_hf2mg(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("hf2mg", help="Hugging Face directory -> Megatron weights for tp x pp ranks")
    parser.add_argument("--family", help="model family (default: told by config.json)")
    source = parser.add_argument_group("source (a hub id is taken wherever a directory is)")
    add_path(source, "--hf", "a whole model; Megatron weights of another layout work too")
    add_path(source, "--llm", "language model to assemble from, with --vision")
    add_path(source, "--vision", "vision tower to assemble from, with --llm")
    add_path(source, "--projector", "trained connector for them: a folder, a whole model, or a .pth", metavar="PATH")
    add_path(parser, "--out", "absent or an empty directory", required=True)
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
    _add_new_parts(parser.add_argument_group("parts that are made new (--llm and --vision)"))


def _add_assemble(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "assemble", help="vision tower + connector + language model -> a new model, as transformers' class that runs it"
    )
    add_path(parser, "--vision", "the tower: CLIP, SigLIP or InternViT", required=True)
    add_path(parser, "--llm", "the language model: Llama, Mistral, Qwen2, Qwen3 or InternLM2", required=True)
    kinds = ("mlp", "pixel_shuffle", "perceiver")
    parser.add_argument("--connector", choices=kinds, required=True, help="what joins them; drawn anew")
    add_path(parser, "--projector", "trained connector: a folder, a whole model, or a .pth", metavar="PATH")
    add_path(parser, "--out", "absent or an empty directory", required=True)
    _add_dtype(parser)
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest safetensors file (5GB)")
    parser.set_defaults(end_of_utterance=False)
    _add_new_parts(parser.add_argument_group("parts that are made new"))


def _add_new_parts(new: "argparse._ArgumentGroup") -> None:
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


def run(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code; users' errors are raised."""
    parser = argparse.ArgumentParser(
        prog="megatron-vlm convert", description="Converts weights between Hugging Face and Megatron layouts."
    )
    add_parser(
        parser.add_subparsers(
            dest="command", required=True, metavar="hf2mg | assemble | mg2hf | merge | pth2hf | verify"
        )
    )
    args = parser.parse_args(argv)
    setup_logging(rank=0)
    from megatron_vlm.cli import convert_commands  # torch

    return convert_commands.COMMANDS[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    """``megatron-vlm convert``, as toolkits/convert calls it."""
    return command(["convert", *(sys.argv[1:] if argv is None else argv)])
