"""Arguments that several commands of argparse share.

add_path            a path: ``~`` and environment variables are expanded, an empty one is refused
add_verify_hashes   ``--no-verify-hashes``, wherever files are compared with the digests that were recorded of them
"""

import argparse
from typing import Any

from megatron_vlm.files import expand_text


class _PathArgument(argparse.Action):
    """Keeps a path, or each of several, as ``files.expand_text`` gives it; an error names the option."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None):
        what = option or str(self.metavar or self.dest)
        if isinstance(values, list):
            expanded: Any = [expand_text(value, what) for value in values]
        else:
            expanded = expand_text(values, what)
        setattr(namespace, self.dest, expanded)


def add_path(group: Any, name: str, help: str, *, metavar: str = "DIR", **more: Any) -> None:
    """Adds a path, or with ``nargs`` several, to a parser or a group of its arguments."""
    group.add_argument(name, action=_PathArgument, metavar=metavar, help=help, **more)


def add_verify_hashes(parser: argparse.ArgumentParser) -> None:
    """Adds ``--no-verify-hashes``, which makes ``verify_hashes`` False."""
    parser.add_argument(
        "--no-verify-hashes",
        dest="verify_hashes",
        action="store_false",
        help="trust the files that are read: compare their sizes alone with what was recorded, not their digests",
    )
