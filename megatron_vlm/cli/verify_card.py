"""``megatron-vlm verify-card FAMILY``: what is claimed of a family, measured without a GPU, as a page (``testing/cards``)."""

import argparse
from collections.abc import Sequence

from megatron_vlm import registry
from megatron_vlm.cli.arguments import add_path
from megatron_vlm.log import setup_logging
from megatron_vlm.registry import Part

_MAKE = Part(
    "megatron_vlm.testing.cards", "card:make_card"
)  # by name: commands know nothing of what tests are made with


def run(argv: Sequence[str]) -> int:
    """Measures; exit code 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(
        prog="megatron-vlm verify-card",
        description="Measures on tiny twins of a family, on the CPU, what is claimed of it, and writes it as a card.",
    )
    parser.add_argument("family", metavar="FAMILY", help=", ".join(registry.FAMILIES))
    add_path(parser, "--output", "file that takes the card (default: printed)", metavar="FILE")
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="CLAIM", help="some claims, by the names that a card gives them"
    )
    parser.add_argument("--quick", action="store_true", help="without updates, layouts and QLoRA; the card says so")
    args = parser.parse_args(argv)
    setup_logging(rank=0)
    return 0 if _MAKE(args.family, args.only, args.quick, args.output) else 1
