"""What every test shares: the GPU tests that cannot run here are left out before they start, and counted at the end."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix_table import table

not_run: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in a random order")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is a rank of the world that another test of its process left: which one ran before depends on the machine."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if torch.distributed.is_initialized():
        from megatron_vlm.parallel.topology import destroy_topology

        destroy_topology()
        torch.distributed.destroy_process_group()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests marked ``gpu`` on a machine without a CUDA device; the longest tests, which start programs, come first.

    With ``--shuffle`` the order is random instead, file by file: fixtures of a file are still made once.
    """
    if (seed := config.getoption("shuffle")) is None:
        items.sort(key=lambda item: item.path.parent.name not in ("examples", "cli"))
    else:
        draw = random.Random(seed)
        places = {path: draw.random() for path in sorted({item.path for item in items})}
        draw.shuffle(items)
        items.sort(key=lambda item: places[item.path])
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        not_run.extend(item.nodeid for item in gpu)
        items[:] = [item for item in items if item not in gpu]
        config.hook.pytest_deselected(items=gpu)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker process of pytest-xdist tells the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = not_run


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects all tests: what one left out, all did."""
    not_run[:] = getattr(node, "workeroutput", {}).get("not_run", not_run)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many GPU tests were not run, and how far layouts were from one process: a green run without a GPU must not look
    like one with it, nor one of a few layouts like the whole matrix."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    outputs = [("/".join(Path(r.nodeid.split("::")[0]).parts[-2:]), r.capstdout) for r in reports if r.when == "call"]
    for line in table(outputs):
        terminalreporter.write_line(line)
    if not_run:
        terminalreporter.write_line(f"gpu: {len(not_run)} tests were NOT run, no CUDA device here:", yellow=True)
        for nodeid in not_run:
            terminalreporter.write_line(f"  {nodeid}")
