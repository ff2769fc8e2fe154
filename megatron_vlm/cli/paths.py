"""Paths on command lines that argparse reads: ``action=PathArgument`` expands ``~`` and environment variables."""

import argparse
from typing import Any

from megatron_vlm.files import expand_text


class PathArgument(argparse.Action):
    """Keeps a path, or each of several, as ``files.expand_text`` gives it; an error names the option."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None):
        what = option or str(self.metavar or self.dest)
        if isinstance(values, list):
            expanded: Any = [expand_text(value, what) for value in values]
        else:
            expanded = expand_text(values, what)
        setattr(namespace, self.dest, expanded)
