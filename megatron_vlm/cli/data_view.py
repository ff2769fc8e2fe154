"""``megatron-vlm data check``: every sample of a folder is read and each problem reported."""

import argparse
from collections import Counter
from typing import Any

from megatron_vlm.errors import DataError


def add_parsers(commands: Any) -> None:
    """Adds the sub-commands to ``megatron-vlm data``; each sets ``handler(args) -> exit code``."""
    check = commands.add_parser("check", help="read every sample of a folder and report each problem; exit 1 if any")
    check.add_argument("dir", metavar="DIR")
    check.set_defaults(handler=_check)


def _check(args: argparse.Namespace) -> int:
    from megatron_vlm.data.check import check_folder

    kinds: Counter[str] = Counter()
    sound = 0
    for found in check_folder(args.dir):
        if isinstance(found, DataError):
            kinds[found.message.split(":")[0]] += 1
            print(found)
        else:
            sound += 1
    for kind, number in kinds.most_common():
        print(f"{number:8d}  {kind}")
    print(f"{args.dir}: {sound} sound samples, {sum(kinds.values())} problems")
    return 1 if kinds else 0
