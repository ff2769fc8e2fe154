"""`megatron-vlm generate`: arguments -> GenerateConfig -> answers; and the arguments that it shares with `evaluate`."""

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_vlm.cli.arguments import add_path, add_running, add_verify_hashes, data_of, sampling_of
from megatron_vlm.errors import ConfigError
from megatron_vlm.log import setup_logging

USAGE = """Answers of a model: to --prompt (with --image) on standard output, or to every record of --input as JSON lines.
Runs alone on one process, or under torchrun with --tp and --pp; further ranks share the records."""


def add_asking(parser: argparse.ArgumentParser) -> None:
    """Adds what ``asking`` reads."""
    add = parser.add_argument
    add_path(parser, "--load", "Hugging Face model, Megatron weights, a checkpoint or an adapter", required=True)
    add_path(parser, "--base", "the base of an adapter (default: where its files say)")
    add_verify_hashes(parser)
    add("--family", help="checked against what --load holds")
    add_path(parser, "--input", "records with the last answer to be given again", nargs="+", default=[], metavar="FILE")
    add("--format", default="llava", help="format of --input, as of data build (default: llava)")
    add_path(parser, "--image-root", "folder that relative image paths of --input start from", default=".")
    add("--limit", type=int, metavar="N", help="answer the first N records of each input")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts answered together (default: 8)")
    add_running(parser, max_new_tokens=128, precision="fp32")


def asking(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what AskConfig is made of."""
    names = ("load", "base", "verify_hashes", "family", "input", "format", "image_root", "limit", "precision", "device")
    return {
        **{name: getattr(args, name) for name in names},
        "sampling": sampling_of(args) | {"batch_size": args.batch_size},
        "parallel": {"tensor_model_parallel_size": args.tp, "pipeline_model_parallel_size": args.pp},
        "data": data_of(args),
    }


def run(argv: Sequence[str]) -> int:
    """Answers and returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-vlm generate", description=USAGE)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="a question; <image> and <video> mark places, else files come first")
    add_path(
        parser,
        "--image",
        "images, videos or folders of frames of --prompt, in order",
        nargs="+",
        default=[],
        metavar="FILE",
    )
    add("--system", metavar="TEXT", help="a system turn before --prompt")
    add_path(parser, "--out", "where JSON lines go (default: standard output)", metavar="FILE")
    add_asking(parser)
    args = parser.parse_args(argv)
    if args.prompt is None and (args.image or args.system is not None):
        given = "--image" if args.image else "--system"
        what = "leave it out, as the records of --input name their own" if args.input else "add the question"
        raise ConfigError(f"{given} goes with --prompt TEXT, which is not given: {what}")
    setup_logging()
    from megatron_vlm.training.answering.generate import GenerateConfig, run_generate  # megatron-core

    prompt = {"text": args.prompt, "images": args.image, "system": args.system} if args.prompt is not None else None
    run_generate(GenerateConfig.from_dict({**asking(args), "prompt": prompt, "out": args.out}))
    return 0
