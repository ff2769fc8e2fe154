"""``megatron-vlm report RUN ...``: one page about a run, or about several over each other."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.cli.arguments import add_path
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import write_synced, writing
from megatron_vlm.training.metrics.report_page import report_page
from megatron_vlm.training.metrics.run_files import RunFiles

_LIVE_SECONDS = 10


def run(argv: Sequence[str]) -> int:
    """Writes the page; with ``--live`` again and again, until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="megatron-vlm report", description="One self-contained HTML page about runs.")
    add_path(
        parser, "runs", "folder of a run (its --output_dir); several are laid over each other", nargs="+", metavar="RUN"
    )
    add_path(parser, "--out", "page to write (default: report.html in the first folder)", metavar="FILE.html")
    parser.add_argument("--live", type=int, nargs="?", const=_LIVE_SECONDS, metavar="SECONDS",
        help=f"renew it so often, the browser's copy too, until Ctrl-C (default: {_LIVE_SECONDS})")  # fmt: skip
    args = parser.parse_args(argv)
    if args.live is not None and args.live < 1:
        raise ConfigError(f"--live must be at least 1 second, got {args.live}")
    RunFiles.read(Path(args.runs[0]))  # says what it is, where it is no run's folder
    out = Path(args.out or Path(args.runs[0], "report.html"))
    if not out.parent.is_dir() or out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: name a .html file in a folder that exists")
    said = False
    try:
        while True:
            page = report_page([RunFiles.read(Path(folder)) for folder in args.runs], renew_seconds=args.live)
            with writing(out):
                write_synced(out, page.encode())
            if not said:
                print(f"{out}: {len(page) / 1e6:.1f} MB" + (", renewed until Ctrl-C" if args.live else ""), flush=True)
            said = True
            if args.live is None:
                return 0
            time.sleep(args.live)
    except KeyboardInterrupt:
        if args.live is None:
            raise
        return 0
