"""Log lines: who speaks, and where they go."""

import logging

import pytest

from megatron_vlm import log
from megatron_vlm.log import get_logger, setup_logging


@pytest.fixture(autouse=True)
def restored():
    logger = get_logger()
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        if handler not in before[0]:
            handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


def say():
    get_logger("part").info("all is well")
    get_logger("part").warning("look here")


def test_the_first_rank_says_all_and_keeps_it(tmp_path, capsys):
    for _ in range(2):  # a second call doubles nothing
        setup_logging(rank=0, file=tmp_path / "train.log")
    say()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["INFO all is well", "WARNING look here"]
    # Before them stands what libraries warned of in this process until now.
    assert (tmp_path / "train.log").read_text().splitlines()[-2:] == lines


@pytest.mark.parametrize(("local", "texts"), [("0", ["all is well", "look here"]), ("1", ["look here"])])
def test_other_ranks_are_named_and_warn(tmp_path, capsys, monkeypatch, local, texts):
    monkeypatch.setenv("LOCAL_RANK", local)
    setup_logging(rank=9, file=tmp_path / "train.log")
    say()
    assert [line.split("[rank 9] ")[1] for line in capsys.readouterr().out.splitlines()] == texts
    assert not (tmp_path / "train.log").exists()


def test_names():
    assert get_logger("megatron_vlm.data.row").name == "megatron_vlm.data.row"
    assert get_logger("part").parent is logging.getLogger("megatron_vlm")


def test_warnings_of_libraries_appear_once_and_in_the_file_alone(tmp_path, capsys, monkeypatch):
    libraries = log._LibraryWarnings()
    monkeypatch.setattr(log, "_libraries", libraries)
    shown = []
    monkeypatch.setattr(log, "_show_others", lambda *told: shown.append(str(told[0])))
    for _ in range(2):
        log._show_warning("full scope is deprecated", UserWarning, "/x/megatron/core/config.py", 1)
        log._show_warning("mine", UserWarning, "/x/mine.py", 1)
        libraries.handle(
            logging.makeLogRecord({"levelno": logging.WARNING, "levelname": "WARNING", "msg": "no kernels"})
        )
        setup_logging(rank=0, file=tmp_path / "train.log")
    setup_logging(rank=1)
    log._show_warning("of another rank", UserWarning, "/x/megatron/core/config.py", 1)
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines == ["WARNING UserWarning of megatron/core: full scope is deprecated", "WARNING no kernels"]
    assert shown == ["mine", "mine"] and capsys.readouterr() == ("", "")
