"""Parses settings from YAML files and the command line; errors name the key, the value and what is allowed."""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from .._utils.validation import suggest
from .._utils.yaml_files import read_word, read_yaml
from ..adapter.config import LoRAPlusConfig
from ..data.options import EITHER
from .recipes import find_config
from .schema import DEFAULT_LORA, DeviceSettings, Settings

AnySettings = TypeVar("AnySettings", bound=Settings | DeviceSettings)


class SettingField(NamedTuple):
    """One setting.

    Attributes:
      name: `section.field`.
      type: the Python type, with its bounds as annotations.
      default: the default as in YAML; None if the setting is required.
      required: whether there is no default.
      text: the help text.
    """

    name: str
    type: Any
    default: Any
    required: bool
    text: str


def parse_settings(
    config: str | Path | None,
    overrides: Sequence[str] = (),
    kind: type[AnySettings] = Settings,
    *,
    log: Callable[[str], object] = lambda _: None,
) -> AnySettings:
    """Reads settings from a YAML file and `--section.field value` arguments, which take precedence.

    Args:
      config: the YAML file, or the name of a recipe; None for `DeviceSettings`, which have no file.
      overrides: the arguments.
      kind: `Settings`, a subclass with more sections, or `DeviceSettings`.
      log: called with a message for each setting that is passed again with another value.

    Raises:
      ValueError: the file cannot be read, a key is unknown (the message suggests the closest one), or a value has
        the wrong type or is out of range.
    """
    values = {} if config is None else read_yaml(config := find_config(config), links="any")
    if not isinstance(values, Mapping):
        raise ValueError(f"{config} must contain a mapping of settings, got {values!r:.80}")
    values, fields = dict(values), {field.name: field for field in setting_fields(kind)}
    for name, value in _parse_overrides(overrides, fields, log):
        section, _, field = name.rpartition(".")
        if not section:
            values[field] = value
        elif isinstance(values.setdefault(section, {}), Mapping):
            values[section] = {**values[section], field: value}
    settings = _validate(kind, values)
    if isinstance(settings, Settings) and not settings.data.files:
        raise ValueError(f"data: {EITHER}, got neither")
    return settings


def settings_from_json(values: Mapping[str, Any], kind: type[AnySettings] = Settings) -> AnySettings:
    """The inverse of `Settings.to_json`; errors are those of `parse_settings`."""
    return _validate(kind, values)


def setting_fields(kind: type[Settings | DeviceSettings] = Settings) -> Iterator[SettingField]:
    """Yields every setting in order, with its help text from the docstrings."""
    yield from _section_fields(kind, "")


def format_settings(kind: type[Settings | DeviceSettings] = Settings) -> str:
    """Returns the part of `--help` on settings: each as `--section.field`, with type, meaning and default."""
    lines = []
    section = None
    for field in setting_fields(kind):
        if (prefix := field.name.partition(".")[0] if "." in field.name else "") != section:
            section = prefix
            lines += ["", f"{section or 'run'}:"]
        default = "required" if field.required else f"default {_format_value(field.default)}"
        text = f"{field.text.rstrip('.')} ({default})"
        lines += [f"  --{field.name} {_metavar(field.type)}", *textwrap.wrap(text, **_INDENT)]
    return "\n".join(lines)


_INDENT: Any = {"width": 100, "initial_indent": " " * 6, "subsequent_indent": " " * 6}


def _section_fields(section: Any, prefix: str) -> Iterator[SettingField]:
    types, texts = typing.get_type_hints(section, include_extras=True), _attribute_texts(section)
    for field in dataclasses.fields(section):
        annotation = types[field.name]
        inner, _ = _split_annotated(annotation)
        if dataclasses.is_dataclass(inner):
            yield from _section_fields(inner, f"{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        # The run's default. None stays: other fields determine the value.
        if section is LoRAPlusConfig and default is not None:
            default = getattr(DEFAULT_LORA, field.name)
        required = default is dataclasses.MISSING
        name = prefix + field.name
        yield SettingField(name, annotation, None if required else default, required, texts[field.name])


def _attribute_texts(section: Any) -> dict[str, str]:
    """The texts of the `Attributes:` sections of a class and its bases, by field, each joined to one line."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        # From Python 3.13 on the compiler removes the indentation.
        body = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for names, text in re.findall(r"(?m)^ {2}([\w, ]+): ((?:.*\n?)(?: {4}.*\n?)*)", body):
            texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return texts


def _parse_overrides(
    arguments: Sequence[str], fields: Mapping[str, SettingField], log: Callable[[str], object]
) -> Iterator[tuple[str, Any]]:
    remaining, passed = list(arguments), dict[str, str]()
    while remaining:
        argument = remaining.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise ValueError(f"unexpected argument {argument!r:.80}; pass settings as --section.field VALUE")
        if name not in fields:
            raise ValueError(f"unknown option --{name:.80}{_suggest_option(name, fields)}")
        if not equals:
            if not remaining:
                raise ValueError(f"--{name} requires a value: {describe_type(fields[name].type)}")
            text = remaining.pop(0)
        if passed.setdefault(name, text) != text:  # a script's own values may stand before the user's
            log(f"--{name} is passed twice; {text} replaces {passed[name]}")
            passed[name] = text
        yield name, _parse_value(fields[name].type, text)


def _parse_value(annotation: Any, text: str) -> Any:
    """Parses a command-line value; text stays text unless it is null, or a list or mapping that fits."""
    value, types = read_word(text), _bare_types(annotation)
    accepts_text = str in types or any(get_origin(type_) is Literal for type_ in types)
    if not accepts_text or text == "null":
        return value
    is_container = isinstance(value, list | dict) and any(
        get_origin(type_) in (*_LISTS, *_MAPPINGS) for type_ in types
    )
    return value if is_container else text


def _union_members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (typing.Union, type(int | None))
    members = get_args(annotation) if is_union else (annotation,)
    return tuple(member for member in members if member is not type(None))


_LISTS, _MAPPINGS = (tuple, Sequence), (dict, Mapping)
_NOUNS: dict[Any, str] = {bool: "true or false", int: "integer", float: "number", str: "text"}
_METAVARS: dict[Any, str] = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}
_ARTICLES: dict[Any, str] = {int: "an ", float: "a "}


def describe_type(annotation: Any) -> str:
    """Describes the values that a field accepts, with their bounds.

    >>> from loraplus_jax._utils.field_types import Count
    >>> describe_type(Count | None), describe_type(tuple[float, ...])
    ('an integer of at least 1 or null', 'a list of numbers')
    """
    texts = [_describe_member(member) for member in _union_members(annotation)]
    return " or ".join([*texts, *(["null"] if type(None) in get_args(annotation) else [])])


def _describe_member(annotation: Any) -> str:
    type_, limits = _split_annotated(annotation)
    if get_origin(type_) is Literal:
        return f"one of {', '.join(get_args(type_))}"
    if get_origin(type_) in _LISTS:
        inner, _ = _split_annotated(get_args(type_)[0])
        of_names = inner is str or get_origin(inner) is Literal
        items = "names" if of_names else f"{_NOUNS[inner]}s"
        return f"a {'non-empty ' if 'min_length' in limits else ''}list of {items}"
    if get_origin(type_) in _MAPPINGS:
        return "a mapping"
    if type_ is str:
        if limits.get("max_length") == 1:
            return "one character"
        return "non-empty text" if "pattern" in limits else "text"
    bounds = [
        f"{text} {_format_value(limits[key])}"
        for key, text in _BOUNDS.items()
        if key in limits and limits[key] <= 2**32
    ]
    of = " of " if type_ is int and bounds else " "
    return f"{_ARTICLES.get(type_, '')}{_NOUNS[type_]}{of if bounds else ''}{' and '.join(bounds)}"


_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _split_annotated(annotation: Any) -> tuple[Any, dict[str, Any]]:
    if get_origin(annotation) is not Annotated:
        return annotation, {}
    type_, *notes = get_args(annotation)
    limits = {}
    for note in notes:
        for limit in getattr(note, "metadata", [note]):
            names = (*_BOUNDS, "min_length", "max_length", "pattern")
            limits |= {key: getattr(limit, key) for key in names if hasattr(limit, key)}
    return type_, limits


def _metavar(annotation: Any) -> str:
    words = []
    for type_ in _bare_types(annotation):
        if get_origin(type_) is Literal:
            words.append("|".join(get_args(type_)))
        else:
            words.append(_METAVARS.get(type_) or ("{...}" if get_origin(type_) in _MAPPINGS else "[...]"))
    return "|".join(words)


def _bare_types(annotation: Any) -> list[Any]:
    return [_split_annotated(member)[0] for member in _union_members(annotation)]


# Names that users of other libraries try.
_ALIASES = {
    "lr": "optimizer.learning_rate",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_r": "lora.rank",
    "loraplus_lr_ratio": "lora.lr_ratio",
    "lambda": "lora.lr_ratio",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "max_seq_length": "data.max_length",
    "output": "output_dir",
}


def _suggest_option(name: str, fields: Mapping[str, Any]) -> str:
    """`suggest`, also for other libraries' names and for a field without its section."""
    last = name.rpartition(".")[2]
    exact = [f for f in fields if f == _ALIASES.get(last) or f.rpartition(".")[2] == last]
    if exact:
        return f"; did you mean {' or '.join(map(repr, exact))}?"
    return suggest(name, fields, fallback=False)


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


_KEY = "[key]"  # what pydantic adds to the path of a mapping's key that is not allowed


def _validate(kind: type[AnySettings], values: Any) -> AnySettings:
    for section, keys in (("config", values), *((k, v) for k, v in values.items() if isinstance(v, Mapping))):
        for key in keys:
            if not isinstance(key, str):
                raise ValueError(f"{section}: unknown key {key!r:.80}")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        fields = {field.name: field for field in setting_fields(kind)}
        # One per field: of a union pydantic reports a problem with every member.
        problems: dict[str, str] = {}
        for problem in error.errors(include_url=False):
            name = ""
            for part in problem["loc"]:
                if name in fields and len(_union_members(fields[name].type)) > 1:
                    # The path goes on with the type of a union's member; the first one speaks for all.
                    break
                if isinstance(part, str) and part != _KEY:
                    name += f".{part}" if name else part
            if name not in problems:
                problems[name] = _format_problem(fields, name, problem)
        raise ValueError("; ".join(problems.values())[:1000]) from None


def _format_problem(fields: Mapping[str, SettingField], name: str, problem: Any) -> str:
    """Formats a pydantic error as one line: the field, what is allowed, and the value."""
    cause, value = problem["type"], problem["input"]
    section, _, key = name.rpartition(".")
    if cause == "unexpected_keyword_argument":
        known = [n.removeprefix(f"{section}.") for n in fields if not section or n.startswith(f"{section}.")]
        known = list(dict.fromkeys(n.partition(".")[0] for n in known))
        if name == "sweep":
            return "config: the section sweep is for loraplus sweep; run that, or remove the section"
        return f"{section or 'config'}: unknown key {key!r:.80}{suggest(key, known)}"
    if cause == "missing":
        return f"{next(n for n in fields if n == name or n.startswith(f'{name}.'))} is required"
    if cause == "dataclass_type":
        return f"{name or 'config'} must be a mapping of settings, got {value!r:.80}"
    # Raised by `__post_init__`: fields of a section that conflict.
    if cause == "value_error" and name not in fields:
        message = str(problem["ctx"]["error"]).removeprefix(f"{LoRAPlusConfig.__name__}: ")
        first_word = re.split(r"\W", message)[0]
        if f"{name}.{first_word}" in fields:
            return f"{name}.{message}"
        return message if not name or f"{name}." in message else f"{name}: {message}"
    index = "".join(f"[{part}]" for part in problem["loc"] if isinstance(part, int))
    while name and name not in fields:  # within a mapping that is one value
        name, _, key = name.rpartition(".")
        index = f"[{key}]{index}"
    if not name:
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {value!r:.80}"
    annotation = fields[name].type
    if cause == "string_unicode":
        return f"{name} must be text in UTF-8, got {value!r:.80}"
    if cause == "distinct":
        return f"{name} must be a list of distinct values, got {value!r:.80}"
    if cause == "value_error":
        return f"{name} {problem['ctx']['error']}"
    if index:
        container = _bare_types(annotation)[0]
        of_value = get_origin(container) in _MAPPINGS and problem["loc"][-1] != _KEY
        annotation = get_args(container)[-1 if of_value else 0]
    hint = ""
    if cause == "literal_error":
        hint = suggest(str(value), get_args(_bare_types(annotation)[0]), fallback=False)
    elif cause == "float32":
        hint = ", which float32 cannot represent"
    elif cause == "tuple_type" and value is not None:
        hint = f"; write [{_format_value(value)}]"
    return f"{name}{index} must be {describe_type(annotation)}, got {value!r:.80}{hint}"
