"""Settings from YAML files and the command line: unknown keys and wrong values are named, with what is allowed."""

import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from .._validation import suggest
from ..config import LoRAPlusConfig
from .schema import DEFAULT_LORA, Settings
from .yaml_files import read_word, read_yaml

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


class SettingField(NamedTuple):
    """One value that can be set.

    Attributes:
      name: `section.field`.
      type: the Python type, its bounds in annotations.
      default: in YAML; None where there is none, and `required` says so.
      text: what it means.
    """

    name: str
    type: Any
    default: Any
    required: bool
    text: str


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
    if not Path(config).is_file():
        raise ValueError(f"there is no config file {config}")
    values = read_yaml(Path(config))
    if not isinstance(values, Mapping):
        raise ValueError(f"{config} must hold a mapping of settings, got {values!r:.80}")
    values, fields = dict(values), {field.name: field for field in setting_fields(kind)}
    for name, word in _overrides(overrides, fields):
        section, _, field = name.rpartition(".")
        if not section:
            values[field] = word
        elif isinstance(values.setdefault(section, {}), Mapping):
            values[section] = {**values[section], field: word}
    return _validate(kind, values)


def settings_from_json(values: Mapping[str, Any]) -> Settings:
    """The inverse of `Settings.to_json`."""
    return _validate(Settings, values)


def setting_fields(kind: type[Settings] = Settings) -> Iterator[SettingField]:
    """Every value that can be set, in order; texts are those of the docstrings."""
    yield from _fields_of(kind, "")


def format_help(kind: type[Settings] = Settings, command: str = "train") -> str:
    """Every field as `--section.field`, with type, default and meaning.

    Args:
      kind: `Settings`, or a class with more sections than it has.
      command: whose usage is shown, with its options that are no settings.
    """
    own = _OPTIONS.get(command, {})
    usage = " ".join([f"loraplus {command} CONFIG [--section.field VALUE ...]", *(f"[{o}]" for o in own)])
    lines = [f"usage: {usage}", "", "CONFIG is a YAML file; options on the command line win.", ""]
    lines += [f"  {option}\n      {text}" for option, text in own.items()]
    section = None
    for field in setting_fields(kind):
        if (first := field.name.partition(".")[0] if "." in field.name else "") != section:
            section = first
            lines += ["", f"{section or 'run'}:"]
        default = "required" if field.required else f"default {_word(field.default)}"
        text = f"{field.text.rstrip('.')} ({default})"
        lines += [f"  --{field.name} {_metavar(field.type)}", *textwrap.wrap(text, **_INDENT)]
    return "\n".join(lines)


_INDENT: Any = {"width": 100, "initial_indent": " " * 6, "subsequent_indent": " " * 6}


def _fields_of(section: Any, prefix: str) -> Iterator[SettingField]:
    types, texts = typing.get_type_hints(section, include_extras=True), _texts(section)
    for field in dataclasses.fields(section):
        wanted = types[field.name]
        inner, _ = _split_annotated(wanted)
        if dataclasses.is_dataclass(inner):
            yield from _fields_of(inner, f"{field.name}.")
            continue
        default = _default(section, field)
        required = default is dataclasses.MISSING
        name = prefix + field.name
        yield SettingField(name, wanted, None if required else default, required, texts[field.name])


def _default(section: Any, field: Any) -> Any:
    if section is LoRAPlusConfig and field.default is not None:
        return getattr(DEFAULT_LORA, field.name)
    return field.default


def _texts(section: Any) -> dict[str, str]:
    """The section `Attributes:` of a class, one line a field; of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        body = (base.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for name, text in re.findall(r"(?m)^ {6}([\w, ]+): ((?:.*\n?)(?: {8}.*\n?)*)", body):
            found |= dict.fromkeys(name.split(", "), " ".join(text.split()))
    return found


def _overrides(words: Sequence[str], fields: Mapping[str, SettingField]) -> Iterator[tuple[str, Any]]:
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r:.80}; settings are --section.field value")
        if name not in fields:
            raise ValueError(f"there is no option --{name:.80}{suggest(name, fields, fallback=False)}")
        if not equals:
            if not left:
                raise ValueError(f"--{name} needs a value, {describe_type(fields[name].type)}")
            text = left.pop(0)
        yield name, _read(fields[name].type, text)


def _read(wanted: Any, text: str) -> Any:
    """A word for a field; where text is allowed it stays text, unless it is a list and one is allowed too."""
    value, kinds = read_word(text), _bare_kinds(wanted)
    takes_text = str in kinds or any(get_origin(kind) is Literal for kind in kinds)
    if not takes_text or text == "null":
        return value
    is_container = isinstance(value, list | dict) and any(get_origin(kind) in (tuple, dict) for kind in kinds)
    return value if is_container else text


def _kinds(wanted: Any) -> tuple[Any, ...]:
    """The members of a union, without null, their limits included."""
    is_union = get_origin(wanted) in (typing.Union, type(int | None))
    return tuple(kind for kind in (get_args(wanted) if is_union else (wanted,)) if kind is not type(None))


_WORDS: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_METAVARS: dict[Any, str] = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}


def describe_type(wanted: Any) -> str:
    """What a field takes, in words, its bounds included.

    >>> from loraplus_jax.settings.types import Count
    >>> describe_type(Count | None), describe_type(tuple[float, ...])
    ('a whole number of at least 1 or null', 'a list of numbers')
    """
    words = [_describe_kind(kind) for kind in _kinds(wanted)]
    return " or ".join([*words, *(["null"] if type(None) in get_args(wanted) else [])])


def _describe_kind(wanted: Any) -> str:
    kind, limits = _split_annotated(wanted)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        inner, _ = _split_annotated(get_args(kind)[0])
        of = " of names" if inner is str else f" of {_WORDS[inner]}s"
        return f"a {'non-empty ' if 'min_length' in limits else ''}list{of}"
    if get_origin(kind) is dict:
        return "a mapping"
    if kind is str:
        return "text that is not empty" if "pattern" in limits else "text"
    article = "a " if kind in (int, float) else ""
    bounds = [
        f"{word} {_word(limits[key])}"
        for key, word in _BOUNDS.items()
        if key in limits and limits[key] < 2**32
    ]
    of = " of " if kind is int and bounds else " "
    return f"{article}{_WORDS[kind]}{of if bounds else ''}{' and '.join(bounds)}"


_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _split_annotated(wanted: Any) -> tuple[Any, dict[str, Any]]:
    """A type without its annotations, and the limits that they set."""
    if get_origin(wanted) is not Annotated:
        return wanted, {}
    kind, *notes = get_args(wanted)
    limits = {}
    for note in notes:
        for limit in getattr(note, "metadata", [note]):
            limits |= {
                key: getattr(limit, key) for key in (*_BOUNDS, "min_length", "pattern") if hasattr(limit, key)
            }
    return kind, limits


def _metavar(wanted: Any) -> str:
    words = []
    for kind in _bare_kinds(wanted):
        if get_origin(kind) is Literal:
            words.append("|".join(get_args(kind)))
        else:
            words.append(_METAVARS.get(kind) or ("{...}" if get_origin(kind) is dict else "[...]"))
    return "|".join(words)


def _bare_kinds(wanted: Any) -> list[Any]:
    return [_split_annotated(kind)[0] for kind in _kinds(wanted)]


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _validate(kind: type[AnySettings], values: Any) -> AnySettings:
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        fields = {field.name: field for field in setting_fields(kind)}
        problems: dict[str, str] = {}  # one a field: pydantic also counts the values of a list that are left
        for problem in error.errors(include_url=False):
            name = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
            problems.setdefault(name, _explain(fields, name, problem))
        raise ValueError("; ".join(problems.values())[:1000]) from None


def _explain(fields: Mapping[str, SettingField], name: str, problem: Any) -> str:
    """One of pydantic's errors as field, what is allowed, and what was given."""
    cause, given = problem["type"], problem["input"]
    section, _, last = name.rpartition(".")
    if cause == "unexpected_keyword_argument":
        known = [n.removeprefix(f"{section}.") for n in fields if not section or n.startswith(f"{section}.")]
        known = list(dict.fromkeys(n.partition(".")[0] for n in known))
        return f"{section or 'config'}: there is no key {last!r:.80}{suggest(last, known)}"
    if cause == "missing":
        return f"{next(n for n in fields if n == name or n.startswith(f'{name}.'))} is required"
    if cause == "dataclass_type":
        return f"{name or 'config'} must be a mapping of settings, got {given!r:.80}"
    if cause == "value_error" and name not in fields:  # several values of a section that do not go together
        message = str(problem["ctx"]["error"])
        first = re.split(r"\W", message)[0]
        if f"{name}.{first}" in fields:
            return f"{name}.{message}"
        return message if not name or f"{name}." in message else f"{name}: {message}"
    wanted = fields[name].type
    places = "".join(f"[{part}]" for part in problem["loc"] if isinstance(part, int))
    if cause == "distinct":
        return f"{name} must be a list of different values, got {given!r:.80}"
    if cause == "value_error":
        return f"{name} {problem['ctx']['error']}"
    if places:
        wanted = get_args(_bare_kinds(wanted)[0])[0]
    hint = (
        suggest(str(given), get_args(_bare_kinds(wanted)[0]), fallback=False)
        if cause == "literal_error"
        else ""
    )
    hint = ", which float32 cannot hold" if cause == "float32" else hint
    return f"{name}{places} must be {describe_type(wanted)}, got {given!r:.80}{hint}"
