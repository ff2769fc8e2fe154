"""``megatron-vlm recipe``: list, show and copy the packaged recipes."""

import argparse
import sys
from collections.abc import Sequence

from megatron_vlm.cli.arguments import add_path
from megatron_vlm.options import recipes


def run(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code: 1 where ``list`` finds nothing."""
    parser = argparse.ArgumentParser(prog="megatron-vlm recipe", description="The packaged recipes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | show | copy")
    listing = commands.add_parser("list", help="names and what they are for")
    listing.add_argument("-p", "--pattern", metavar="PATTERN", help="only names that contain or match this")
    show = commands.add_parser("show", help="print a recipe")
    copying = commands.add_parser("copy", help="copy a recipe to a folder, to edit and run it there")
    for command in (show, copying):
        command.add_argument("name", metavar="NAME", help="as listed, or the last part of it")
    add_path(copying, "directory", "")
    args = parser.parse_args(argv)
    if args.command == "list":
        found = recipes.names(args.pattern)
        width = max(map(len, found), default=0)
        for name in found:
            print(f"{name:<{width}}  {recipes.title_of(name)}")
        if not found:
            print(f"no recipe has {args.pattern!r} in its name; `megatron-vlm recipe list` shows all", file=sys.stderr)
        return 0 if found else 1
    if args.command == "show":
        print(recipes.path_of(args.name).read_text(encoding="utf-8"), end="")
    else:
        print(recipes.copy(args.name, args.directory))
    return 0
