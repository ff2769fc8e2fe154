"""``megatron-vlm data stats`` and ``preview``: data as the model will see it, before a run starts."""

import argparse
import os
from pathlib import Path

from megatron_vlm.cli import data_check
from megatron_vlm.config import apply_overrides, load_yaml
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.stream.loader import open_data
from megatron_vlm.data.types import Processor
from megatron_vlm.data.view.preview import preview_page
from megatron_vlm.data.view.stats import collect, describe, plot
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import check_output, read_json, write_synced, writing
from megatron_vlm.registry import family_of


def check(args: argparse.Namespace) -> int:
    """`data check` under a model's or a run's settings."""
    config, paths = _config(args)
    args.paths = paths or [str(getattr(source, "path", source)) for source in config.train]
    return data_check.check(args, _processor(args.model, config) if args.model else None)


def stats(args: argparse.Namespace) -> int:
    """Prints what a run makes of the data, and draws histograms."""
    if args.global_batch_size < 1:
        raise ConfigError(f"--global-batch-size must be at least 1, got {args.global_batch_size}")
    config, paths = _config(args)
    if args.out:
        _check_out(args, config)
    config = config.replace(packing=True, group_by=None)
    opened = open_data(config, _processor(args.model, config), paths or config.train, seed=1234)
    found = collect(opened, config, args.global_batch_size)
    print(describe(found))
    if args.out:
        plot(found, Path(args.out))
        print(f"\nhistograms: {args.out}")
    return 0


def preview(args: argparse.Namespace) -> int:
    """Writes the page."""
    if args.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {args.samples}")
    config, paths = _config(args)
    _check_out(args, config)
    processor = _processor(args.model, config)
    opened = open_data(config, processor, paths or config.train, seed=args.seed)
    page = preview_page(opened, processor, config, seed=args.seed, num_samples=args.samples)
    with writing(args.out):
        write_synced(Path(args.out), page.encode("utf-8", "backslashreplace"))
    print(f"{args.out}: {len(page) / 1e6:.1f} MB")
    return 0


def _config(args: argparse.Namespace) -> tuple[DataConfig, list[str]]:
    """Returns the DataConfig, and the paths that the command line names."""
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


def _processor(model: str, config: DataConfig) -> Processor:
    """Returns the processor of a model, its files compared with the digests that were recorded of them.

    A Hugging Face folder, of which none are recorded, needs no weights.
    """
    if os.path.isfile(Path(model, "config.json")):
        return family_of(read_json(Path(model, "config.json"))).open_processor(Path(model), config)
    with open_source(model) as source:
        return source.spec.open_processor(source.hf_dir, config)


def _check_out(args: argparse.Namespace, config: DataConfig) -> None:
    """Refuses an output that would take the place of what it is made from, or that has no folder; before anything is read."""
    parent = Path(args.out).parent
    if not os.path.isdir(parent):
        raise ConfigError(f"{args.out} cannot be written: {parent} is no folder")
    folders = [*args.paths, *(getattr(source, "path", source) for source in config.train), args.model]
    check_output(args.out, folders, "--out")
    if args.config and os.path.exists(args.out) and os.path.samefile(args.out, args.config):
        raise ConfigError(f"--out {args.out} is the file that --config names: choose another place")


COMMANDS = {"check": check, "stats": stats, "preview": preview}
