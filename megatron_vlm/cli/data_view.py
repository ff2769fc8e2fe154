"""``megatron-vlm data stats`` and ``preview``, and ``check`` with a model: data as a run will see it, before it starts."""

import argparse
import os
from pathlib import Path

from megatron_vlm.cli import data_check
from megatron_vlm.cli.data_settings import ViewSettings, settings_of
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream.loader import open_data
from megatron_vlm.data.view.cards import read_records, read_shards, records_page
from megatron_vlm.data.view.preview import preview_page
from megatron_vlm.data.view.stats import collect, describe, plot
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import check_output, write_synced, writing


def check(args: argparse.Namespace) -> int:
    """`data check` under a model's or a run's settings."""
    settings = settings_of(args, recipe=False)
    args.paths = [str(getattr(item, "path", item)) for item in settings.inputs]
    args.model = settings.model
    return data_check.check(args, settings.processor(), settings.videos()[0])


def stats(args: argparse.Namespace) -> int:
    """Prints what a run makes of the data, and draws histograms."""
    if args.global_batch_size is not None and args.global_batch_size < 1:
        raise ConfigError(f"--global-batch-size must be at least 1, got {args.global_batch_size}")
    settings = settings_of(args)
    if args.out:
        _check_out(args, settings)
    processor = settings.processor()
    if processor is None:
        raise ConfigError("stats counts tokens: name --model, or a --config that does (checkpoint.load)")
    config = settings.data.replace(packing=True, group_by=None)
    opened = open_data(config, processor, settings.shards(), seed=settings.seed)
    found = collect(opened, config, args.global_batch_size or settings.global_batch_size or 256)
    print(f"{settings.said}\n\n{describe(found)}")
    if args.out:
        plot(found, Path(args.out))
        print(f"\nhistograms: {args.out}")
    return 0


def preview(args: argparse.Namespace) -> int:
    """Writes the page; without a model, of the records as they are written."""
    if args.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {args.samples}")
    settings = settings_of(args)
    _check_out(args, settings)
    processor = settings.processor()
    title = ", ".join(str(getattr(item, "path", item)) for item in settings.inputs)
    if processor is None:
        inputs = settings.raw()
        records = read_shards(Dataset(inputs.folders)) if inputs.folders else read_records(inputs.sources)
        page = records_page(records, title, num_samples=args.samples, wanted=args.match)
    else:
        print(settings.said)
        seed = settings.seed if args.seed is None else args.seed
        folders = settings.shards()
        opened = open_data(settings.data, processor, folders, seed=seed)
        shown = {"said": settings.said, "wanted": args.match, "title": "" if folders == settings.inputs else title}
        page = preview_page(opened, processor, settings.data, seed=seed, num_samples=args.samples, **shown)
    with writing(args.out):
        write_synced(Path(args.out), page.encode("utf-8", "backslashreplace"))
    print(f"{args.out}: {len(page) / 1e6:.1f} MB")
    return 0


def _check_out(args: argparse.Namespace, settings: ViewSettings) -> None:
    """Refuses an output that would take the place of what it is made from, or that has no folder; before anything is read."""
    parent = Path(args.out).parent
    if not os.path.isdir(parent):
        raise ConfigError(f"{args.out} cannot be written: {parent} is no folder")
    inputs = [str(getattr(item, "path", item)) for item in settings.inputs]
    folders = [item for item in inputs if os.path.isdir(item)] + ([settings.model] if settings.model else [])
    check_output(args.out, folders, "--out")
    files = [args.config, *(item for item in inputs if os.path.isfile(item))]
    for file in filter(None, files):
        if os.path.exists(args.out) and os.path.exists(file) and os.path.samefile(args.out, file):
            what = "the file that --config names" if file == args.config else "the data"
            raise ConfigError(f"--out {args.out} is {what}: choose another place")


COMMANDS = {"check": check, "stats": stats, "preview": preview}
