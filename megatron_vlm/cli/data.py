"""``megatron-vlm data``: build shards from public formats, check them."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from megatron_vlm.config import nearest
from megatron_vlm.errors import ConfigError, DataError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the ``data`` command; each sub-command sets ``handler(args) -> exit code``."""
    commands = subparsers.add_parser("data", help="build and check training data").add_subparsers(required=True)

    build = commands.add_parser("build", help="turn records and images into tar shards with an index")
    build.add_argument("--format", required=True, help="format of the inputs: llava")
    build.add_argument("--input", required=True, nargs="+", metavar="FILE", help="json or jsonl files")
    build.add_argument("--image-root", metavar="DIR", help="folder that relative image paths start from")
    build.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    build.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    build.add_argument("--processor", metavar="HFDIR", help="count tokens right away for this model (see --seq-length)")
    build.add_argument("--seq-length", type=int, metavar="N", help="with --processor: as the run will set it")
    build.set_defaults(handler=_build)

    check = commands.add_parser("check", help="read every sample of a folder and report each problem; exit 1 if any")
    check.add_argument("dir", metavar="DIR")
    check.set_defaults(handler=_check)


def _build(args: argparse.Namespace) -> int:
    from megatron_vlm.data.formats import READERS
    from megatron_vlm.data.shards import build_shards

    if args.format not in READERS:
        raise ConfigError(f"unknown format {args.format!r}{nearest(args.format, READERS)}; known: {', '.join(READERS)}")
    if args.image_root is not None and not Path(args.image_root).is_dir():
        raise ConfigError(f"--image-root {args.image_root} is not a folder")
    sources = ((path, READERS[args.format](path)) for path in args.input)
    manifest = build_shards(
        sources,
        args.out,
        image_root=args.image_root,
        samples_per_shard=args.samples_per_shard,
        progress=_progress if sys.stderr.isatty() else None,
    )
    num_bytes = sum(shard["bytes"] for shard in manifest["shards"])
    shards = len(manifest["shards"])
    print(
        f"{args.out}: {manifest['samples']} samples, {manifest['images']} images, {shards} shards, {num_bytes / 1e6:.1f} MB"
    )
    return 0


def _progress(samples: int) -> None:
    if samples % 100 == 0:
        print(f"\r{samples} samples", end="", file=sys.stderr, flush=True)


def _check(args: argparse.Namespace) -> int:
    from megatron_vlm.data.check import check_folder

    kinds: Counter[str] = Counter()
    total = 0
    for problem in check_folder(args.dir):
        if isinstance(problem, DataError):
            kinds[problem.message.split(":")[0]] += 1
            print(problem)
        else:
            total += 1
    for kind, number in kinds.most_common():
        print(f"{number:8d}  {kind}")
    print(f"{args.dir}: {total} samples are sound, {sum(kinds.values())} problems")
    return 1 if kinds else 0
