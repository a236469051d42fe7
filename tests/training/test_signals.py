"""The first signal is recorded; further ones act only after a grace period; a lost stdout counts as one."""

import io
import signal
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from loraplus_jax._utils.output import Output
from loraplus_jax.training import signals
from loraplus_jax.training.signals import GRACE_SECONDS, StopSignal


class Acted(Exception):
    pass


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def number(request):
    """A signal that raises where nothing else handles it."""

    def act(*_):
        raise Acted

    before = signal.signal(request.param, act)
    yield request.param
    assert signal.getsignal(request.param) is act
    signal.signal(request.param, before)


def test_signals_within_the_grace_period_are_recorded_and_a_later_one_acts(number, monkeypatch):
    clock = types.SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(signals, "time", clock)
    with StopSignal() as stop:
        assert stop.received is None
        assert not stop.is_due(1)
        for seconds in (0, 0.1, 1, GRACE_SECONDS):
            clock.now = 100 + seconds
            signal.raise_signal(number)
            assert stop.received == number
            assert stop.is_due(1)
        clock.now += 0.1
        with pytest.raises(Acted):
            signal.raise_signal(number)


def test_a_stdout_that_cannot_be_written_counts_as_a_broken_pipe(monkeypatch):
    stdout = Output(io.StringIO())
    with StopSignal() as stop:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert not stop.is_due(1)
        stdout.error = OSError(28, "No space left on device")
        assert stop.is_due(1)
        monkeypatch.undo()
        assert stop.received == signal.SIGPIPE


def test_outside_the_main_thread_a_run_trains_and_the_handlers_stay(number):
    """Only the main thread may set handlers."""
    handler = signal.getsignal(number)

    def train():
        with StopSignal() as stop:
            assert signal.getsignal(number) is handler
            return stop.is_due(1)

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(train).result()


def test_a_handler_that_was_set_in_c_stays(number, monkeypatch):
    """Python does not know it, and could not set it again."""
    handler, getsignal = signal.getsignal(number), signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == number else getsignal(n))
    with StopSignal():
        assert getsignal(number) is handler
    assert getsignal(number) is handler
    monkeypatch.undo()
