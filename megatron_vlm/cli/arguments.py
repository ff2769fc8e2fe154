"""Arguments that several commands of argparse share.

add_path            a path: ``~`` and environment variables are expanded, an empty one is refused
add_running         how answers are drawn, the layout, precision and device, ``data.key=value``, of a command that asks a model
add_verify_hashes   ``--no-verify-hashes``, wherever files are compared with the digests that were recorded of them
"""

import argparse
from typing import Any

from megatron_vlm.config import apply_overrides
from megatron_vlm.errors import ConfigError
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


def add_running(parser: argparse.ArgumentParser, *, max_new_tokens: int, precision: str | None) -> None:
    """Adds what ``sampling_of`` and ``data_of`` read, and tp, pp, precision and device; the arguments are defaults."""
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="most of an answer (default: %(default)s)",
    )
    add("--temperature", type=float, default=0.0, metavar="X", help="0 (default): the likeliest token each time")
    add("--top-p", type=float, default=1.0, metavar="P")
    add("--seed", type=int, default=0, metavar="N")
    add("--tp", "--tensor-model-parallel-size", type=int, default=1, metavar="N")
    add("--pp", "--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    default = precision or "bf16 on a GPU, fp32 on the CPU"
    add("--precision", choices=("fp32", "bf16", "fp16"), default=precision, help=f"of the weights (default: {default})")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    add(
        "data",
        nargs="*",
        default=[],
        metavar="data.key=value",
        help="how images are treated, as in the training config",
    )


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """How answers are drawn."""
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}


def data_of(args: argparse.Namespace) -> dict[str, Any]:
    """Section ``data`` of the words ``data.key=value``; raises ConfigError for those of another section."""
    given = apply_overrides({}, args.data)
    if other := [name for name in given if name != "data"]:
        raise ConfigError(f"{other[0]}=... has no effect on answers: only data.key=value has")
    return given.get("data", {})


def add_verify_hashes(parser: argparse.ArgumentParser) -> None:
    """Adds ``--no-verify-hashes``, which makes ``verify_hashes`` False."""
    parser.add_argument(
        "--no-verify-hashes",
        dest="verify_hashes",
        action="store_false",
        help="trust the files that are read: compare their sizes alone with what was recorded, not their digests",
    )
