"""Command lines become keywords; words of settings never reach argparse."""

from pathlib import Path

import pytest

from loraplus_jax.cli.parser import Command, flag, parse, path, value

from ..refusals import refusals
from ..settings.values import LEAST, write

OPTIONS = {"--fresh": flag("start over"), "--part": value("a part", action="append")}
SETTINGS = {
    "config": value("a file", metavar="CONFIG"),
    "overrides": value("settings", nargs="*", default=()),
}
RUN = {"run": value("a run", path, metavar="RUN"), "--size": value("its size", int), **OPTIONS}
COMMANDS = {
    "show": Command("show a run", print, RUN),
    "use": Command("use a run", print, RUN | {"--config": value("a file")}, "settings.schema:DeviceSettings"),
    "make": Command("make a run", print, SETTINGS | OPTIONS, "settings.schema:Settings"),
}


def keywords(*words):
    return parse(COMMANDS, words)[1]


def test_only_what_was_passed_is_passed_on():
    assert keywords("show", "r") == {"run": Path("r")}
    words = ("show", "--part", "a", "~/r", "--size=3", "--part", "b", "--fresh")
    assert keywords(*words) == {"run": Path.home() / "r", "size": 3, "part": ["a", "b"], "fresh": True}


def test_words_of_settings_are_told_from_options(tmp_path):
    config = str(write(tmp_path, LEAST | {"task": "instruction"}))
    settings = ("--train.prompt", "-hot", "--mesh.data", "-1", "--seed=7")
    given = keywords("make", config, *settings[:3], "--part", "b", *settings[3:], "--fresh", "--part=c")
    assert (given["settings"].train.prompt, given["settings"].mesh.data, given["settings"].seed) == (
        "-hot",
        -1,
        7,
    )
    assert given["words"] == [config, *settings]
    before = keywords("make", "--part", "b", "--fresh", config, *settings, "--part=c")
    assert before == given
    assert {name: given[name] for name in given.keys() - {"settings", "words"}} == {
        "fresh": True,
        "part": ["b", "c"],
    }


def test_settings_of_devices_have_no_file_and_may_be_anywhere():
    words = ("--mesh.data", "-1", "r", "--part", "b", "--distributed.coordinator=auto", "--size", "3")
    given = keywords("use", *words)
    settings = given.pop("settings")
    assert given == {"run": Path("r"), "part": ["b"], "size": 3}
    assert (settings.mesh.data, settings.mesh.fsdp, settings.distributed.coordinator) == (-1, None, "auto")
    # A config of theirs is not the file of these settings.
    assert keywords("use", "r", "--config", "run.yaml")["config"] == "run.yaml"


def given(line):
    return lambda: keywords(*line.split())


test_what_is_rejected = refusals(
    (given("use r --mesh.date 3"), "--mesh.date", "'mesh.data'"),
    (given("use r --mesh.data x"), "mesh.data", "integer", "'x'"),
    (given("use r --mesh.data"), "--mesh.data", "value", "integer"),
    (given("use r r --mesh.data 1"), "use", "accept r"),
    (given("show r --sise 3"), "show", "--sise 3"),
    (given("show r --size x"), "--size", "'x'", "loraplus show --help"),
    (given("show ~nosuchuser/r"), "RUN", "~nosuchuser", "no home directory"),
    (given("make --seed 3"), "CONFIG", "loraplus make --help"),
    (given("make c.yaml --part"), "--part", "loraplus make --help"),
    (given("show r --size 3 --size=4"), "--size", "twice"),
    (given("make c.yaml --fresh=1"), "--fresh", "'1'"),
)


@pytest.mark.parametrize(("command", "has_settings"), [("show", False), ("make", True)])
def test_help_shows_arguments_with_their_values_and_settings(capsys, command, has_settings):
    with pytest.raises(SystemExit):
        keywords(command, "c.yaml", "--help")
    printed = capsys.readouterr().out
    assert "--part TEXT" in printed
    assert ("--size INT" in printed) != has_settings
    assert ("--optimizer.learning_rate FLOAT" in printed) == has_settings
