import os
import signal
import subprocess
import sys

import pytest

from loraplus_jax.train.data import DataSettings
from loraplus_jax.train.lifecycle import StopSignal, check_directory, only_run
from loraplus_jax.train.settings import ModelSettings, Settings

HOLD = """
import pathlib, sys
from loraplus_jax.train.lifecycle import only_run
with only_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"pid {first.pid} is at work"), only_run(tmp_path):
            pass
        first.kill()
    with only_run(tmp_path):  # the system let go of the lock when the process was killed
        assert (tmp_path / ".pid").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / ".pid").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_leaves_a_note_and_the_second_acts(number):
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


@pytest.mark.parametrize("names", [[], [".lock"], [".lock", ".pid"], [".lock", ".config.yaml.partial"]])
def test_a_run_killed_before_its_first_file_starts_over(tmp_path, names):
    settings = Settings(
        model=ModelSettings(path="m"), data=DataSettings(path="d"), output_dir=str(tmp_path / "out")
    )
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).touch()
    check_directory(tmp_path / "out", settings, fresh=False)
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(ValueError, match="not a run's"):
        check_directory(tmp_path / "out", settings, fresh=False)
