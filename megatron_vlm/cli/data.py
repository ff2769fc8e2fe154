"""``megatron-vlm data``: build shards from public formats; ``data_view`` checks and shows them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.cli import data_view
from megatron_vlm.config import nearest
from megatron_vlm.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Runs one of the sub-commands and returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-vlm data", description="build, check and look at training data")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="turn records and images into tar shards with an index")
    build.add_argument("--format", required=True, help="format of the inputs: llava")
    build.add_argument("--input", required=True, nargs="+", metavar="FILE", help="json or jsonl files")
    build.add_argument("--image-root", metavar="DIR", help="folder that relative image paths start from (default: .)")
    build.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    build.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    build.set_defaults(handler=_build)
    data_view.add_parsers(commands)

    args = parser.parse_args(argv)
    return args.handler(args)


def _build(args: argparse.Namespace) -> int:
    from megatron_vlm.data.formats import READERS
    from megatron_vlm.data.shards import build_shards

    if args.format not in READERS:
        raise ConfigError(f"unknown format {args.format!r}{nearest(args.format, READERS)}; known: {', '.join(READERS)}")
    if args.image_root is not None and not Path(args.image_root).is_dir():
        raise ConfigError(f"--image-root {args.image_root} is not a folder")
    manifest = build_shards(
        [(path, READERS[args.format](path)) for path in args.input],
        args.out,
        image_root=args.image_root,
        samples_per_shard=args.samples_per_shard,
        progress=_progress if sys.stderr.isatty() else None,
    )
    shards = manifest["shards"]
    size = f"{len(shards)} shards, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB"
    print(f"{args.out}: {manifest['samples']} samples, {manifest['images']} images, {size}")
    return 0


def _progress(samples: int) -> None:
    if samples % 100 == 0:
        print(f"\r{samples} samples", end="", file=sys.stderr, flush=True)
