"""``megatron-vlm data check``: every record read, each problem named; without a model no framework is loaded."""

import argparse
import os
from collections import Counter
from collections.abc import Iterator

from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.formats.records import OWN_VIDEO
from megatron_vlm.data.types import Processor
from megatron_vlm.data.view.check import check_folder, check_sources
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.launch.inputs import sources_of
from megatron_vlm.options.launch_config import LaunchConfig


def check(args: argparse.Namespace, processor: Processor | None = None, record_format: str = "llava") -> int:
    """Prints every problem of ``args.paths``, and counts by kind; exit code 1 if there is one.

    Args:
        args: of the command.
        processor: of the model; None: samples are not encoded.
        record_format: of records that do not tell theirs, as the model's family has it.
    """
    kinds: Counter[str] = Counter()
    sound = problems = 0
    for found in _found(args, processor, record_format):
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


def _found(args: argparse.Namespace, processor: Processor | None, record_format: str) -> Iterator[str | DataError]:
    if not args.paths:
        raise ConfigError("no data: name a folder, or a --config whose data.train does")
    if args.part and args.format is None:
        raise ConfigError("--split chooses among raw files: it goes with --format")
    own = OWN_VIDEO if processor is None else processor.video
    if args.format is None:
        launch = LaunchConfig(image_root=args.image_root, missing_placeholder=args.missing_placeholder)
        for path in args.paths:
            if os.path.isdir(path):
                yield from check_folder(path, processor)
            elif os.path.exists(path):  # told by its content, as `launch` does
                yield from check_sources(sources_of(path, launch, record_format, own), processor)
            else:
                raise ConfigError(
                    f"{path} does not exist: name a json, jsonl, data.txt or meta.json file, or a shard folder"
                )
        return
    settings = {"root": args.image_root or ".", "prepend": args.missing_placeholder == "prepend", "video": own}
    yield from check_sources(open_sources(args.format, args.paths, part=args.part, **settings), processor)
