"""The first signal is noted, the second acts."""

import signal
import subprocess
import sys

import pytest

from loraplus_jax.training.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_recorded_and_the_second_acts(number):
    class Acted(Exception):
        pass

    def act(*_):
        raise Acted

    before = signal.signal(number, act)
    try:
        with StopSignal() as stop:
            assert stop.received is None
            signal.raise_signal(number)
            assert stop.received == number
            with pytest.raises(Acted):
                signal.raise_signal(number)
        assert signal.getsignal(number) is act
    finally:
        signal.signal(number, before)


NOTED = """
import signal, time, loraplus_command
from loraplus_jax.training.signals import StopSignal
loraplus_command.listen()
with StopSignal() as stop:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(1)  # so that a thread that was told of it would have acted
    print(stop.received, flush=True)
signal.raise_signal(signal.SIGTERM)
"""


def test_a_handled_signal_does_not_end_the_command_and_a_later_one_does():
    done = subprocess.run([sys.executable, "-c", NOTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "15\n", "loraplus: stopped by SIGTERM\n")
