"""torchrun with a quiet end: `python -m megatron_vlm.launch.agent TORCHRUN'S ARGUMENTS`.

    SIGTERM, SIGUSR1, Ctrl-C, SIGHUP -> SIGTERM to every rank, which finishes its step and saves; one line, exit code 143
    a rank that fails                -> one line that names it; its own output says why; exit code 1

torchrun itself answers both with some thirty lines of its own frames, after everything is saved or said.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_vlm.log import quiet_libraries
from megatron_vlm.training.stop import STOPPED

HANDLED = "SIGTERM,SIGUSR1"
"""Signals that torchrun passes on to the ranks as they are."""
_TURNED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end a rank at once; here they mean what SIGTERM does."""


def main(argv: Sequence[str]) -> int:
    """Runs torchrun's own main; returns the exit code."""
    quiet_libraries()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in list(
        logging.root.manager.loggerDict
    ):  # they tell of each rank that is signalled, and of each that failed
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    for number in _TURNED:
        signal.signal(number, _as_sigterm)
    try:
        torchrun(["--signals-to-handle", HANDLED, *argv])
    except SignalException as error:
        print(f"stopped by {signal.Signals(error.sigval).name}: all ranks of this node have ended", flush=True)
        return STOPPED
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if set(codes.values()) == {STOPPED}:
            print("stopped by a signal: all ranks of this node have ended", flush=True)
            return STOPPED
        rank, first = error.get_first_failure()
        said = f"exit code {first.exitcode}" if first.exitcode >= 0 else signal.Signals(-first.exitcode).name
        print(
            f"rank {rank} ended with {said} and the others with it: its output above says why",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
