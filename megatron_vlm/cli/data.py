"""``megatron-vlm data``: build shards from public formats; ``data_check`` and ``data_view`` check and show them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.cli import data_check
from megatron_vlm.cli.arguments import add_path
from megatron_vlm.data.formats import guess_records, open_sources
from megatron_vlm.data.formats.records import SAMPLING, VideoSettings
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.split import SplitSettings
from megatron_vlm.errors import ConfigError
from megatron_vlm.progress import Bar


def run(argv: Sequence[str]) -> int:
    """Runs one of the sub-commands and returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-vlm data", description="build, check and look at training data")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    _add_views(commands)
    args = parser.parse_args(argv)
    if args.command == "build":
        return _build(args)
    settings = (args.model, args.config, args.set, args.seq_length)
    if args.command == "check" and not any(settings):
        return data_check.check(args)
    from megatron_vlm.cli import data_view  # torch

    return data_view.COMMANDS[args.command](args)


def _add_build(commands: Any) -> None:
    build = commands.add_parser("build", help="turn records and images into tar shards with an index")
    add = build.add_argument
    add("--format", required=True, help="llava, xcomposer, internvl, openai, parquet, webdataset")
    add_path(build, "--input", "files or globs; for webdataset also folders", required=True, nargs="+", metavar="FILE")
    add_path(build, "--image-root", "folder that relative image paths start from (default: .)")
    add_path(build, "--out", "folder to make; with --val-fraction DIR/train and DIR/val", required=True)
    add("--samples-per-shard", type=int, default=1000, metavar="N")
    add("--workers", type=int, metavar="N", help="processes (default: one per core, 8 at most)")
    add("--repeat", type=float, nargs="+", default=[], metavar="X",
        help="how often an epoch reads the data, whole or not: one number, or one per input")  # fmt: skip
    add("--missing-placeholder", choices=["refuse", "prepend"], default="refuse",
        help="a record with images and no place for them: refuse it, or put them before its first question")  # fmt: skip
    add("--on-bad-sample", choices=["raise", "skip"], default="raise",
        help="records that cannot be used: report them all and make nothing, or leave them out and list them")  # fmt: skip
    add("--max-bad-fraction", type=float, default=0.01, metavar="F",
        help="largest share of records that `skip` may leave out; above it nothing is made (default: 0.01)")  # fmt: skip
    add("--val-fraction", type=float, metavar="F", help="share of the records that goes to DIR/val")
    add("--split-by", metavar="id|image|KEY",
        help="what halves must not share besides images; of tars also __key__ (default: image)")  # fmt: skip
    add("--split-seed", type=int, metavar="N", help="another draw of the halves")
    add("--video-frames", type=int, nargs=2, default=[1, None], metavar=("MIN", "MAX"),
        help="frames taken of a video, at most; a shorter one is refused (default: 1 32, by time 1 64 or 1 768)")  # fmt: skip
    add("--video-sampling", choices=SAMPLING,
        help="which frames: middles of equal parts; by time from end to end (SmolVLM2), or in pairs (Qwen-VL)")  # fmt: skip
    add("--video-fps", type=float, metavar="N", help="frames taken a second (default: ends 1, pairs 2)")
    add("--video-folder-fps", type=float, default=24.0, metavar="N",
        help="frames a second of a folder of frames, for time stamps (default: %(default)s)")  # fmt: skip
    add(
        "--frame-text",
        metavar="TEXT",
        help="line of each frame, <image> in it (default: the model that reads it writes it)",
    )
    add("--split", "--part", dest="part", default="", metavar="NAME",
        help="of a folder or glob with several, Energon's too: train, validation, test ..., or all (default: train)")  # fmt: skip


def _add_views(commands: Any) -> None:
    check = commands.add_parser("check", help="read every record and report each problem; exit 1 if any")
    _add_common(check, "folder of shards, or raw file")
    check.add_argument("--format", metavar="NAME", help="of raw files, as for `data build` (default: by their content)")
    add_path(check, "--image-root", "folder that relative image paths start from (default: beside the file, or .)")
    check.add_argument("--missing-placeholder", choices=["refuse", "prepend"], default="refuse",
        help="as for `data build`")  # fmt: skip
    check.add_argument("--split", "--part", dest="part", default="", metavar="NAME", help="as for `data build`")

    stats = commands.add_parser("stats", help="lengths, images, supervised share, packing, steps; as text and PNG")
    _add_common(stats, "folder of shards, or raw file")
    stats.add_argument("--global-batch-size", type=int, metavar="N", help="(default: the config's, else 256)")
    add_path(stats, "--out", "histograms", metavar="FILE.png")

    preview = commands.add_parser(
        "preview", help="one HTML page: records, and with a model tokens, images and rows as it gets them"
    )
    _add_common(preview, "folder of shards, or raw file")
    add_path(preview, "--out", "", required=True, metavar="FILE.html")
    preview.add_argument("--samples", type=int, default=24, metavar="N", help="(default: %(default)s)")
    preview.add_argument("--seed", type=int, metavar="N", help="training.seed (default: the config's, else 1234)")
    preview.add_argument("--match", default="", metavar="TEXT", help="only samples whose name, id or texts hold this")
    for parser in (stats, preview):
        parser.add_argument(
            "--format", metavar="NAME", help="of raw files, as for `data build` (default: by their content)"
        )
        add_path(parser, "--image-root", "folder that relative image paths start from (default: the file's own)")


def _add_common(parser: argparse.ArgumentParser, what: str) -> None:
    add_path(parser, "paths", what, nargs="*", metavar="PATH")
    parser.add_argument("--set", action="append", default=[], metavar="data.KEY=VALUE",
        help="a setting as `train` takes it: data.answer_loss_only=true; may be given several times")  # fmt: skip
    add_path(
        parser, "--model", "HF folder, converted weights or checkpoint whose processor is used; alone: with its recipe"
    )
    parser.add_argument("--config", metavar="FILE | RECIPE | RUN",
        help="settings of a YAML file, a packaged recipe or a run's folder, with the data and model that it names")  # fmt: skip
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="data.seq_length (default: the config's, else 4096)"
    )


def _build(args: argparse.Namespace) -> int:

    if args.image_root is not None and not os.path.isdir(args.image_root):
        raise ConfigError(f"--image-root {args.image_root} is not a folder")
    if args.workers is not None and args.workers < 0:
        raise ConfigError(f"--workers must be at least 0, got {args.workers}")
    if args.val_fraction is None and (args.split_by is not None or args.split_seed is not None):
        raise ConfigError("--split-by and --split-seed go with --val-fraction")
    if not 0 <= args.max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction must be between 0 and 1, got {args.max_bad_fraction}")
    least, most = args.video_frames
    sources = open_sources(
        args.format,
        args.input,
        repeat=args.repeat,
        root=args.image_root or ".",
        prepend=args.missing_placeholder == "prepend",
        part=args.part,
        video=VideoSettings(
            sampling=args.video_sampling,
            min_frames=least,
            max_frames=most,
            fps=args.video_fps,
            folder_fps=args.video_folder_fps,
            announce=args.frame_text,
        ),
    )
    split = None
    if args.val_fraction is not None:
        given = {"by": args.split_by, "seed": args.split_seed}
        split = SplitSettings(fraction=args.val_fraction, **{k: v for k, v in given.items() if v is not None})
    total = guess_records(sources) if sys.stderr.isatty() else None
    with Bar("building", total, file=sys.stderr) as bar:
        report = build_shards(
            sources,
            args.out,
            samples_per_shard=args.samples_per_shard,
            on_bad_sample=args.on_bad_sample,
            max_bad_fraction=args.max_bad_fraction,
            split=split,
            num_workers=min(os.cpu_count() or 1, 8) if args.workers is None else args.workers,
            progress=bar.show,
        )
    for name in ("train", "val") if split else ("",):
        manifest = report[name] if split else report
        shards = manifest["shards"]
        what = "tars as they are" if any("tar" in shard for shard in shards) else "shards"
        size = f"{len(shards)} {what}, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB"
        print(f"{Path(args.out, name)}: {manifest['samples']} samples, {manifest['images']} images, {size}")
        for source in manifest["sources"]:
            if source["repeat"] or source["per_epoch"]:
                often = f"{source['per_epoch']} samples" if source["per_epoch"] else f"{source['repeat']:g} times"
                print(f"  {source['name']}: {source['samples']} samples, an epoch reads {often}")
    if split:
        share = f"{report['realised_fraction']:.4f} of the records for validation, by {split.by}"
        groups = f"{report['components']} groups, the largest of {report['largest_component']} records"
        print(f"{Path(args.out, 'split.json')}: {share}: {groups}")
    rejected = Path(args.out, "rejected.jsonl")
    if os.path.isfile(rejected):
        with rejected.open("rb") as lines:
            print(f"{rejected}: {sum(1 for _ in lines)} records are left out")
    return 0
