"""`megatron-vlm evaluate`: arguments -> ScoreConfig -> scores."""

import argparse
from collections.abc import Sequence

from megatron_vlm.cli.arguments import add_path
from megatron_vlm.cli.generate import add_asking, asking
from megatron_vlm.log import setup_logging

USAGE = """Answers held-out records and scores the answers: with intervals, by subset, beside what is reached without seeing.
Runs as `generate` does, alone or under torchrun; started again with the same --out it goes on where it broke off."""


def run(argv: Sequence[str]) -> int:
    """Scores and returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-vlm evaluate", description=USAGE)
    add = parser.add_argument
    add_asking(parser)
    add_path(parser, "--out", "folder of answers.jsonl, scores.json and mistakes.html", required=True)
    add(
        "--metrics",
        nargs="+",
        default=["exact_match"],
        metavar="NAME",
        help="exact_match, vqa_accuracy, anls, relaxed_accuracy, cer (default: exact_match); the first says what is a mistake",
    )
    add("--subset-key", metavar="KEY", help="key of a record that scores are grouped by (default: several files)")
    add(
        "--baselines",
        nargs="+",
        choices=("blind", "majority"),
        default=[],
        help="blind: without the images; majority: the most common right answer to every question",
    )
    add("--mistakes", type=int, default=50, metavar="N", help="most on the page (default: 50)")
    args = parser.parse_args(argv)
    setup_logging()
    from megatron_vlm.training.answering.held_out import ScoreConfig, run_evaluate  # megatron-core

    values = {name: getattr(args, name) for name in ("out", "metrics", "subset_key", "baselines", "mistakes")}
    run_evaluate(ScoreConfig.from_dict(asking(args) | values))
    return 0
