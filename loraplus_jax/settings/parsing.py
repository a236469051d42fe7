"""Settings from YAML files and the command line: unknown keys and wrong values are named, with what is allowed."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from .._validation import suggest
from .schema import Settings
from .yaml_files import read_yaml

AnySettings = TypeVar("AnySettings", bound=Settings)

_FRESH = {"--fresh": "start over; what an older run left is renamed, not deleted"}
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "train": _FRESH,
    "sweep": _FRESH,
    "plan": {
        "--topology NAME": "TPUs to compile for, such as v5e:16x16",
        "--json FILE": "a new file for all that was found",
    },
}
"""What commands take beside settings, for their help; `cli.py` parses it."""


def parse_settings(
    config: str | Path, overrides: Sequence[str] = (), kind: type[AnySettings] = Settings
) -> AnySettings:
    """Reads settings from a YAML file and `--section.field value` arguments, which win.

    Args:
      config: the file.
      overrides: the arguments.
      kind: `Settings`, or a class with more sections than it has.

    Raises:
      ValueError: the file cannot be read, a key is unknown (the nearest one is named), or a value is of the wrong
        type or out of range.
    """
    _check_file(Path(config), kind)
    known = _dotted(kind)
    for argument in overrides:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name not in known:
            raise ValueError(f"there is no option --{name}{suggest(name, known, fallback=False)}")
    parser = settings_parser(kind)
    try:
        return _instance(kind, parser.parse_args(["--config", str(config), *overrides]))
    except (ArgumentError, OverflowError) as error:  # the second for a whole number that no float can hold
        raise ValueError(_explained(str(error), kind)) from None


def settings_from_json(values: Mapping[str, Any]) -> Settings:
    """The inverse of `Settings.to_json`."""
    _check_keys(values, Settings, "config")
    try:
        return _instance(Settings, settings_parser().parse_object(dict(values)))
    except (ArgumentError, OverflowError) as error:  # the second for a whole number that no float can hold
        raise ValueError(_explained(str(error))) from None


def settings_parser(kind: type[Settings] = Settings, command: str = "train") -> ArgumentParser:
    """A parser of every field as `--section.field`, its help taken from the docstrings here.

    Args:
      kind: `Settings`, or a class with more sections than it has.
      command: whose usage the help shows, with its options that are no settings.
    """
    own = _OPTIONS.get(command, {})
    usage = " ".join([f"loraplus {command} CONFIG [--section.field value ...]", *(f"[{o}]" for o in own)])
    parser = ArgumentParser(
        prog=f"loraplus {command}",
        usage=usage,
        description="; ".join(f"{option}: {text}" for option, text in own.items()) or None,
        exit_on_error=False,
        print_config=None,
    )
    parser.add_argument(
        "--config", action="config", help="the YAML file; on the command line it stands first"
    )
    parser.add_class_arguments(kind, None)
    # The default of the section is a config, whose own default lambda must not outlive another init.
    parser.set_defaults({"lora.lr_ratio": None})
    return parser


def _instance(kind: type[AnySettings], parsed: Any) -> AnySettings:
    sections = _sections(kind)
    values = {}
    for field in dataclasses.fields(kind):
        value, section = parsed[field.name], sections.get(field.name)
        values[field.name] = value if section is None else _section(field.name, section, value)
    return kind(**values)


def _section(name: str, section: type, values: Any) -> Any:
    """One section, its name in front of what it has to complain of; a value of any length may be quoted there."""
    try:
        return section(**{f.name: values[f.name] for f in dataclasses.fields(section)})
    except (ValueError, TypeError) as error:
        prefix = "" if str(error).startswith(f"{name}.") else f"{name}."
        raise ValueError(f"{prefix}{error!s:.1000}") from None


def _check_file(path: Path, kind: type[Settings]) -> None:
    """A readable YAML mapping whose keys all exist."""
    if not path.is_file():
        raise ValueError(f"there is no config file {path}")
    _check_keys(read_yaml(path), kind, str(path))


def _check_keys(values: Any, section: type, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold a mapping of settings, got {values!r:.80}")
    sections = _sections(section)
    fields = [f.name for f in dataclasses.fields(section)]
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{where}: there is no key {key!r:.80}{suggest(str(key), fields)}")
        if key in sections:
            _check_keys(value, sections[key], f"{where}: {key}")


def _sections(section: type) -> dict[str, Any]:
    """The fields of a section that are sections themselves."""
    return {f.name: f.type for f in dataclasses.fields(section) if dataclasses.is_dataclass(f.type)}


def _dotted(section: type, prefix: str = "") -> list[str]:
    """`section.field` for every value that can be set."""
    sections = _sections(section)
    names = []
    for field in dataclasses.fields(section):
        inner = sections.get(field.name)
        names += _dotted(inner, f"{prefix}{field.name}.") if inner else [prefix + field.name]
    return names


def _explained(message: str, kind: type[Settings] = Settings) -> str:
    """The parser's report of a wrong type, in words: which field, what is allowed, what was given."""
    found = re.match(r'Parser key "([\w.]+)":', message)
    # For a type of several kinds the parser says what each of them got, and last what was given for all.
    given = re.search(r"\n\s*Given value: (.*)", message, re.DOTALL) or re.search(
        r"Got value: (.*?)(?:\n\s*- Expected|$)", message, re.DOTALL
    )
    if found is None or given is None:
        return _one_line(message)[:1000]
    name, value = found[1], _one_line(given[1])
    section: Any = kind
    *parents, last = name.split(".")
    for parent in parents:
        section = _sections(section)[parent]
    wanted = next((f.type for f in dataclasses.fields(section) if f.name == last), None)
    choices = get_args(wanted) if get_origin(wanted) is Literal else ()
    allowed = f"one of {', '.join(choices)}" if choices else _WORDS.get(wanted, str(wanted))
    hint = suggest(value, choices, fallback=False) if choices else ""
    return f"{name} must be {allowed}, got {value!r:.80}{hint}"


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    int | None: "a whole number or null",
    float | None: "a number or null",
    str | None: "text or null",
    str | tuple[str, ...]: "a regular expression, or a list of names",
    tuple[str, ...]: "a list of names",
    tuple[int, ...] | None: "a list of whole numbers or null",
    tuple[float, ...]: "a list of numbers",
    tuple[float, ...] | None: "a list of numbers or null",
    dict[str, str] | None: "a mapping from names to columns, or null",
    dict[str, int]: "a mapping from patterns to whole numbers",
    dict[str, float]: "a mapping from patterns to numbers",
    dict[str, str] | tuple[str, ...]: "a list of patterns, or a mapping from them to axis letters",
}


def _one_line(message: str) -> str:
    return " ".join(message.split())
