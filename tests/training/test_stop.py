"""Signals that ask a run to stop."""

import os
import signal

import pytest

from megatron_vlm.training.stop import STOPPED, StopSignal


def test_a_signal_is_remembered_and_the_handlers_come_back(monkeypatch):
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    for number in StopSignal.SIGNALS:
        stop = StopSignal()
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        stop.close()
        assert [signal.getsignal(n) for n in StopSignal.SIGNALS] == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = StopSignal()
    try:
        stop.ignore()  # a rank that failed still has to say why
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.requested
    finally:
        for number, handler in zip(StopSignal.SIGNALS, before):
            signal.signal(number, handler)
    assert STOPPED == 143


def test_a_forked_child_ends_and_asks_nothing():
    stop = StopSignal()
    try:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143 and not stop.requested
    finally:
        stop.close()


def test_ctrl_c_once_saves_and_twice_stops(monkeypatch):
    stop = StopSignal()
    try:
        for _ in range(2):  # of the terminal, and of torchrun
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
        monkeypatch.setattr(StopSignal, "AGAIN_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.close()
