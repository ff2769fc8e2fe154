"""`megatron-vlm demo`: the models of `chat` on a page in the browser."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.cli.arguments import add_path
from megatron_vlm.cli.chat import add_models, serve_config
from megatron_vlm.data.images.pictures import MAX_BYTES
from megatron_vlm.errors import ConfigError
from megatron_vlm.serve.demo_server import serve_demo

USAGE = """A conversation with a model in the browser: pictures, two models side by side, sampling,
a run's curves and held-out examples."""


def run(argv: Sequence[str]) -> int:
    """Serves until Ctrl-C and returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-vlm demo", description=USAGE)
    add_models(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to serve (default: this machine alone; another needs a token)")
    add("--port", type=int, default=7860, metavar="N", help="0: any free one (default: 7860)")
    add("--token", metavar="WORD", help="what callers must know (default: none for this machine, else one is made)")
    add("--max-upload-mb", type=float, default=20.0, metavar="X", help="largest picture (default: 20)")
    add_path(parser, "--run", "folder of a run whose curves are shown (default: MODEL, if it is one)")
    add_path(
        parser, "--examples", "held-out records whose questions are offered", nargs="+", default=[], metavar="FILE"
    )
    add("--format", default="llava", help="format of --examples, as of data build (default: llava)")
    add_path(parser, "--image-root", "folder that relative image paths of --examples start from", default=".")
    args = parser.parse_args(argv)
    if args.token is not None and not re.fullmatch(r"[\w-]{8,}", args.token, re.ASCII):
        raise ConfigError("--token is at least 8 letters (a to z), digits, _ and -")
    most = MAX_BYTES >> 20
    if not 0 < args.max_upload_mb <= most:
        raise ConfigError(f"--max-upload-mb must be above 0 and at most {most}, got {args.max_upload_mb:g}")
    examples = {"format": args.format, "files": args.examples, "image_root": args.image_root}
    serve_demo(
        serve_config(args),
        host=args.host,
        port=args.port,
        token=args.token,
        system=args.system,
        most_mb=args.max_upload_mb,
        run=Path(args.run or args.model),
        examples=examples if args.examples else {},
    )
    return 0
