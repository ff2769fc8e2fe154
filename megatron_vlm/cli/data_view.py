"""``megatron-vlm data check``, ``stats`` and ``preview``: data as the model will see it, before a run starts."""

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.cli.paths import PathArgument
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.files import write_synced, writing


def add_parsers(commands: Any) -> None:
    """Adds the sub-commands to ``megatron-vlm data``; each sets ``handler(args) -> exit code``."""
    check = commands.add_parser("check", help="read every record and report each problem; exit 1 if any")
    _add_common(check, "folder of shards, or with --format an input of `data build`", model_required=False)
    check.add_argument(
        "--format", help="format of inputs that are not shards: llava, xcomposer, internvl, openai, parquet, webdataset"
    )
    check.add_argument(
        "--image-root",
        metavar="DIR",
        action=PathArgument,
        help="folder that relative image paths start from (default: .)",
    )
    check.add_argument("--missing-placeholder", choices=["refuse", "prepend"], default="refuse",
        help="as for `data build`")  # fmt: skip
    check.add_argument("--split", "--part", dest="part", default="", metavar="NAME", help="as for `data build`")
    check.set_defaults(handler=_check)

    stats = commands.add_parser("stats", help="lengths, images, supervised share, packing, steps; as text and PNG")
    _add_common(stats, "folder of shards", model_required=True)
    stats.add_argument("--global-batch-size", type=int, default=256, metavar="N", help="(default: %(default)s)")
    stats.add_argument("--out", metavar="FILE.png", action=PathArgument, help="histograms")
    stats.set_defaults(handler=_stats)

    preview = commands.add_parser("preview", help="one HTML page: tokens, images and rows as the model gets them")
    _add_common(preview, "folder of shards", model_required=True)
    preview.add_argument("--out", required=True, metavar="FILE.html", action=PathArgument)
    preview.add_argument("--samples", type=int, default=24, metavar="N", help="(default: %(default)s)")
    preview.add_argument("--seed", type=int, default=1234, metavar="N", help="training.seed (default: %(default)s)")
    preview.set_defaults(handler=_preview)


def _add_common(parser: argparse.ArgumentParser, what: str, *, model_required: bool) -> None:
    parser.add_argument("paths", nargs="*", metavar="PATH", action=PathArgument, help=what)
    parser.add_argument("--set", action="append", default=[], metavar="data.KEY=VALUE",
        help="a setting as `train` takes it: data.answer_loss_only=true; may be given several times")  # fmt: skip
    parser.add_argument("--model", required=model_required, metavar="DIR", action=PathArgument,
        help="HF folder, converted weights or checkpoint whose processor is used")  # fmt: skip
    parser.add_argument(
        "--config",
        metavar="FILE",
        action=PathArgument,
        help="YAML of a run: its data section is used, folders included",
    )
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="data.seq_length (default: the config's, else 4096)"
    )


def _check(args: argparse.Namespace) -> int:

    kinds: Counter[str] = Counter()
    sound = problems = 0
    for found in _found(args):
        if isinstance(found, str):
            sound += 1
            continue
        kind = found.reason.words
        kinds[kind] += 1
        warning = found.reason.is_warning
        problems += not warning
        print(f"{'warning' if warning else kind}: {found}")
    for kind, number in kinds.most_common():
        print(f"{number:8d}  {kind}")
    print(f"{sound} sound samples, {problems} problems, {sum(kinds.values()) - problems} warnings")
    return 1 if problems else 0


def _found(args: argparse.Namespace) -> Iterator[str | DataError]:
    from megatron_vlm.data.formats import open_sources
    from megatron_vlm.data.view.check import check_folder, check_sources

    config, paths = _config(args)
    processor = _processor(args.model, config) if args.model else None
    if args.part and args.format is None:
        raise ConfigError("--split chooses among raw files: it goes with --format")
    if args.format is None:
        for path in paths:
            if not os.path.isdir(path):
                what = "is no folder of shards: say what it is with --format"
                raise ConfigError(f"{path} {what if os.path.lexists(path) else 'does not exist'}")
            yield from check_folder(path, processor)
        return
    settings = {"root": args.image_root or ".", "prepend": args.missing_placeholder == "prepend"}
    yield from check_sources(open_sources(args.format, paths, part=args.part, **settings), processor)


def _stats(args: argparse.Namespace) -> int:
    from megatron_vlm.data.stream.loader import open_data
    from megatron_vlm.data.view.stats import collect, describe, plot

    if args.global_batch_size < 1:
        raise ConfigError(f"--global-batch-size must be at least 1, got {args.global_batch_size}")
    config, paths = _config(args)
    if args.out:
        _check_out(args, config)
    config = config.replace(packing=True, group_by=None)
    opened = open_data(config, _processor(args.model, config), _sources(config, paths), seed=1234)
    stats = collect(opened, config, args.global_batch_size)
    print(describe(stats))
    if args.out:
        plot(stats, Path(args.out))
        print(f"\nhistograms: {args.out}")
    return 0


def _preview(args: argparse.Namespace) -> int:
    from megatron_vlm.data.stream.loader import open_data
    from megatron_vlm.data.view.preview import preview_page

    if args.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {args.samples}")
    config, paths = _config(args)
    _check_out(args, config)
    processor = _processor(args.model, config)
    opened = open_data(config, processor, _sources(config, paths), seed=args.seed)
    page = preview_page(opened, processor, config, seed=args.seed, num_samples=args.samples)
    with writing(args.out):
        write_synced(Path(args.out), page.encode("utf-8", "backslashreplace"))
    print(f"{args.out}: {len(page) / 1e6:.1f} MB")
    return 0


def _config(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """Returns the DataConfig, and the paths that the command line names."""
    from megatron_vlm.config import apply_overrides, load_yaml
    from megatron_vlm.data.config import DataConfig

    if wrong := [word for word in args.set if not word.startswith("data.")]:
        raise ConfigError(f"--set {wrong[0]}: only settings of the data section have a meaning here, data.KEY=VALUE")
    plain = apply_overrides(load_yaml(args.config) if args.config else {}, args.set)
    data = {"seq_length": 4096, "packing": True, "num_workers": os.cpu_count() or 1, **(plain.get("data") or {})}
    if args.seq_length is not None:
        data["seq_length"] = args.seq_length
    # What a run would refuse is looked at here: exclusions are counted, not raised.
    for name, value in (("on_too_long", "drop"), ("on_bad_sample", "skip")):
        data[name] = value if data.get(name, "raise") == "raise" else data[name]
    config = DataConfig.from_dict(data, "data")
    if not args.paths and not config.train:
        raise ConfigError("no data: name a folder, or a --config whose data.train does")
    return config, args.paths


def _sources(config: Any, paths: Sequence[str]) -> Sequence[Any]:
    return paths or config.train


def _processor(model: str, config: Any) -> Any:
    """Returns the processor of a model, its files compared with the digests that were recorded of them.

    A Hugging Face folder, of which none are recorded, needs no weights.
    """
    from megatron_vlm.files import read_json
    from megatron_vlm.registry import family_of

    if os.path.isfile(Path(model, "config.json")):
        return family_of(read_json(Path(model, "config.json"))).open_processor(Path(model), config)
    from megatron_vlm.conversion.open_source import open_source

    with open_source(model) as source:
        return source.spec.open_processor(source.hf_dir, config)


def _check_out(args: argparse.Namespace, config: Any) -> None:
    """Refuses an output that would take the place of what it is made from, or that has no folder; before anything is read."""
    from megatron_vlm.files import check_output

    parent = Path(args.out).parent
    if not os.path.isdir(parent):
        raise ConfigError(f"{args.out} cannot be written: {parent} is no folder")
    folders = [*args.paths, *(getattr(source, "path", source) for source in config.train), args.model]
    check_output(args.out, folders, "--out")
    if args.config and os.path.exists(args.out) and os.path.samefile(args.out, args.config):
        raise ConfigError(f"--out {args.out} is the file that --config names: choose another place")
