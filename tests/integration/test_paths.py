"""Any legal path works or is rejected before anything is written; a user's strings reach the terminal escaped."""

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from loraplus_jax.cli.commands import main
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.trainer import train

from ..messages import assert_mentions, mentions
from .runs import stopped, tensor_bytes
from .test_bad_input import contents

pytestmark = pytest.mark.usefixtures("cache")
STRANGER = "~nosuchuser/x"


def test_the_cache_and_templates_of_an_unknown_user_are_named(talk, capsys, monkeypatch, no_own_cache):
    before = contents(talk.directory)
    assert talk.train("--data.template", STRANGER) == 2
    assert_mentions(capsys.readouterr().err, "template", STRANGER)
    monkeypatch.setenv("LORAPLUS_CACHE", STRANGER)
    assert talk.train() == 2
    assert_mentions(capsys.readouterr().err, "LORAPLUS_CACHE", STRANGER)
    assert contents(talk.directory) == before


@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize(("name", "word"), [("a\\b", "checkpoints"), ("a\udcffb", "UTF-8")])
def test_a_directory_in_which_nothing_can_be_saved_is_rejected(
    first_world, tmp_path, monkeypatch, capsys, command, name, word
):
    monkeypatch.chdir(tmp_path)
    assert main([command, str(first_world.config), "--output_dir", name]) == 2
    assert_mentions(capsys.readouterr().err, "output_dir", word)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a [/red] [bold]b[/bold] :smile:", "a [/red] [bold]b[/bold] :smile:"),
        ("a\x1b[2J\x07\r\x7f\x9b1mb", r"a\u001b[2J\u0007\r\u007f\u009b1mb"),
        ("two\nlines\u2028more", r"two\nlines\u2028more"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("caf\udce9", r"caf\udce9"),
        ("für 日本 👩‍💻 می‌خواهم \\n", "für 日本 👩‍💻 می‌خواهم \\n"),
    ],
)
def test_a_string_of_the_user_is_shown_as_it_is_but_for_what_steers_the_terminal(
    tmp_path, capsys, text, shown
):
    console = LineConsole()
    console.print(text)
    console.print(text, text, sep="\n")
    assert capsys.readouterr().out == f"{shown}\n" * 3
    assert main(["train", f"{text}.yaml"]) == 2
    assert capsys.readouterr().err == f"loraplus: error: config file not found: {shown}.yaml\n"
    assert main(["eval", str(tmp_path), f"--{text}"]) == 2
    assert capsys.readouterr().err == f"loraplus: error: eval does not accept --{shown}\n"


def test_a_console_that_would_interpret_strings_is_rejected(first_world):
    settings = parse_settings(first_world.config)
    with pytest.raises(TypeError, match=mentions("console", "LineConsole")):
        train(settings, console=Console())
    assert not first_world.out.exists()


@pytest.mark.slow
def test_characters_that_stdout_lacks_are_escaped(first_world):
    command = [sys.executable, "-m", "loraplus_jax.cli", "eval", "pfad-jä"]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )
    assert run.returncode == 2
    assert rb"pfad-j\xe4" in run.stderr


AWKWARD = "a*[b] [/red][bold]\x1b[2J\n?"


@pytest.mark.slow
def test_a_run_moved_to_an_awkward_name_resumes_evaluates_and_exports(world, capsys):
    rows = [row | {"label": f"[/{row['label']}]\x1b[1m"} for row in world.rows()]
    data = world.write_rows("[x]*.csv", rows)
    args = ("--data.path", str(data), "--train.steps", "6", "--train.eval_every", "2")
    straight = world.trained(*args, out=world.directory / "plain")
    out = world.directory / AWKWARD
    shown = str(out).replace("\x1b", r"\u001b").replace("\n", r"\n")
    out.parent.mkdir()  # the name has a slash
    stopped(world, 4, *args).rename(out)
    capsys.readouterr()
    assert world.train(*args, out=out) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert f"results in {shown}:" in printed
    assert r"[/yes]\u001b[1m" in printed
    assert "step 4 of 6" in printed
    assert tensor_bytes(out) == tensor_bytes(straight)
    assert main(["eval", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] > 0
    to = world.directory / "[/red]*"
    assert main(["export", str(out), "--to", str(to)]) == 0
    assert (to / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_run_whose_base_and_data_moved_resumes_as_if_they_had_not(world, capsys):
    args = ("--train.steps", "6", "--train.eval_every", "2")
    straight = world.trained(*args, out=world.directory / "plain")
    out = stopped(world, 4, *args)
    moved = moved_files(world)
    assert world.train(*args, *moved) == 0
    assert tensor_bytes(out) == tensor_bytes(straight)
    assert_mentions(capsys.readouterr().out, "settings changed", "model.path", "data.path", *moved[1::2])
    assert main(["eval", str(out)]) == 0  # by the paths that the run has now


def moved_files(world):
    """Moves the base and the data of a world; returns the settings that name them."""
    to = world.directory / "elsewhere"
    to.mkdir()
    base, data = (file.rename(to / file.name) for file in (world.model, world.data))
    return ("--model.path", str(base), "--data.path", str(data))
