"""Makes the parser and the help of the command line from one record a command."""

import argparse
import itertools
import os
import pkgutil
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .._utils.validation import expand_path
from ..settings.recipes import RECIPES

TRACEBACK = "LORAPLUS_TRACEBACK"


class Command(NamedTuple):
    """A command.

    Attributes:
      text: help text.
      run: runs the command with the arguments that were passed, as keywords; returns a text to print, an exit code,
        or None for 0.
      arguments: what argparse's `add_argument` takes, by option or by name of a positional argument; also
        `requires`, options of which one must be passed with it, and `excludes`, those that must not be: names, or a
        name and a value such as `--format gguf`. An option that is 0 counts as left out.
      settings: class of the settings that the command accepts, as `module:class`; `run` gets `settings`. If
        `arguments` has a `config`, it also gets `words`, what they were read from: the config file and the settings
        on the command line.
      uses_jax: whether the command computes; it then imports JAX, which takes a second.
      opens: what runs instead if the config is a directory or a file of tensors, with its path.
    """

    text: str
    run: Callable[..., str | int | None]
    arguments: Mapping[str, Mapping[str, Any]]
    settings: str = ""
    uses_jax: bool = True
    opens: Callable[..., str | None] | None = None


def path(text: str) -> Path:
    """The type of a path; expands `~`."""
    try:
        return expand_path("path", text)
    except ValueError as error:  # argparse shows only the message of its own error
        raise argparse.ArgumentTypeError(str(error)) from None


METAVARS = {str: "TEXT", int: "INT", float: "FLOAT", path: "PATH"}


def value(
    text: str, type: Callable[[str], Any] = str, choices: Sequence[str] | None = None, **more: Any
) -> dict[str, Any]:
    """An argument with a value; `more` is passed to `add_argument`."""
    metavar = METAVARS[type] if choices is None else "|".join(choices)
    return {"help": text, "type": type, "choices": choices, "metavar": metavar, **more}


def flag(text: str, **more: Any) -> dict[str, Any]:
    """An option without a value."""
    return {"help": text, "action": "store_true", **more}


def describe(argument: Mapping[str, Any]) -> str:
    """The help text of an argument, with the options that it requires and excludes."""
    rules = {"requires": argument.get("requires"), "not with": argument.get("excludes")}
    return "; ".join([argument["help"], *(f"{rule} {' or '.join(x)}" for rule, x in rules.items() if x)])


def load(name: str) -> Any:
    """Imports `module:name` of the package."""
    return pkgutil.resolve_name(f"loraplus_jax.{name}")


def parse(
    commands: Mapping[str, Command], words: Sequence[str], log: Callable[[str], object] = lambda _: None
) -> tuple[Command, dict[str, Any]]:
    """Returns the command of a command line, and the arguments that were passed; `log` as for `parse_settings`.

    Raises:
      ValueError: the words are not those of a command, or settings are invalid.
      SystemExit: help was printed.
    """
    words, overrides = _split(commands, words)
    options, unknown = make_parser(commands).parse_known_args(words)
    keywords = vars(options)
    command = commands[name := keywords.pop("command")]
    if unknown:
        raise ValueError(f"{name} does not accept {' '.join(unknown)}")
    _check_options(name, command.arguments, keywords)
    if command.settings:
        # Here: pydantic is slow to import, and half of the commands need no settings.
        from ..settings.parsing import parse_settings

        # Of a command that uses a run, `--config` is an option like any other.
        config = keywords.pop("config") if "config" in command.arguments else None
        keywords.pop("overrides", None)
        if command.opens is not None and _has_tensors(place := expand_path("config", config or "")):
            if overrides:
                raise ValueError(
                    f"{name} {place} shows an adapter, without settings; remove {' '.join(overrides)}"
                )
            return command._replace(run=command.opens), {"place": place}
        try:
            keywords["settings"] = parse_settings(config, overrides, load(command.settings), log=log)
        except ValueError as error:
            # The settings of a command without a config are few.
            raise error if config is not None else ValueError(f"{name}: {error}") from None
        if config is not None:
            keywords["words"] = [config, *overrides]
    return command, keywords


def _check_options(
    command: str, arguments: Mapping[str, Mapping[str, Any]], keywords: Mapping[str, Any]
) -> None:
    """Raises ValueError if an argument was passed without an option that it requires, or with one it excludes."""
    passed = {
        name: keywords[key]
        for name, argument in arguments.items()
        if (key := argument.get("dest", name.removeprefix("--"))) in keywords
    }

    def is_passed(option: str) -> bool:
        name, _, wanted = option.partition(" ")
        value = passed.get(name, 0)
        return value == wanted if wanted else value != 0

    for name in passed:
        argument = arguments[name]
        label = name if name.startswith("--") else argument["metavar"]
        for option in filter(is_passed, argument.get("excludes", ())):
            raise ValueError(f"{command} {label} cannot be combined with {option}")
        required = argument.get("requires", ())
        if required and not any(map(is_passed, required)):
            other = required[0].partition(" ")[0]
            got = f", got {other} {passed[other]}" if other in passed else ""
            raise ValueError(f"{command} {label} requires {' or '.join(required)}{got}")


def _has_tensors(place: Path) -> bool:
    is_file = place.suffix in (".safetensors", ".npz", ".gguf")
    return is_file or (os.path.isdir(place) and str(place) not in RECIPES)


def _split(commands: Mapping[str, Command], words: Sequence[str]) -> tuple[list[str], list[str]]:
    # Argparse would take a setting's value such as -1 for an option, so it never sees settings.
    if not words or words[0] not in commands or not commands[words[0]].settings:
        return [*words], []
    arguments = commands[words[0]].arguments
    takes_value = {name: "type" in more for name, more in arguments.items() if name[0] == "-"}
    takes_value |= {"-h": False, "--help": False}
    own, settings, rest = [words[0]], [], iter(words[1:])
    is_before = "config" in arguments  # its config, which is the first word that is no option
    for word in rest:
        name, equals, _ = word.partition("=")
        if "config" in arguments:  # all words are settings and their values, except it and the options
            is_config, has_value = is_before and word[:1] != "-", False
            is_setting = not (is_config or name in takes_value)
            is_before &= not (is_config or is_setting)
        else:
            is_setting = has_value = name.startswith("--") and "." in name
        part = settings if is_setting else own
        part.append(word)
        part += itertools.islice(rest, (takes_value.get(name, False) or has_value) and not equals)
    return own, settings


def make_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Returns the parser of all commands; it leaves out what was not passed, so that `run` has the defaults."""
    parser = _Parser(
        prog="loraplus",
        description="Fine-tune pretrained models with LoRA+.",
        epilog=f"Set {TRACEBACK}=1 to show tracebacks.",
    )
    parser.add_argument("--version", action="version", help="show versions and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, _, arguments, settings, *_) in commands.items():
        command = subparsers.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        command.settings = settings
        command.register("action", None, _Once)
        for argument, more in arguments.items():
            options: dict[str, Any] = {x: more[x] for x in more if x not in ("requires", "excludes")}
            options["help"] = describe(more)
            command.add_argument(argument, **options)
    return parser


class _Once(argparse.Action):
    """Stores a value, which may be passed once."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Raises ArgumentError if there is a value."""
        if option_string is not None and hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, "passed twice; leave one out")
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help lists the settings that a command accepts."""

    settings = ""

    @property
    def version(self) -> str:
        """What `--version` prints: argparse asks for it only then."""
        versions = [f"{name} {version(name)}" for name in ("loraplus_jax", "jax", "flax")]
        return ", ".join([*versions, f"Python {platform.python_version()}"])

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with the message of argparse, and where the options are listed."""
        raise ValueError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        """Returns the help on the arguments, and on every setting."""
        if not self.settings:
            return super().format_help()
        from ..settings.parsing import format_settings

        return f"{super().format_help()}{format_settings(load(self.settings))}\n"
