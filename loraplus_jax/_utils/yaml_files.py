"""Reads YAML files as untrusted input: plain values only, without aliases or duplicate keys."""

import re
from pathlib import Path
from typing import Any

import yaml

from .json_files import Links, check_file, check_not_utf16, find_problem, parse_int
from .validation import repeated


def read_yaml(path: Path, *, links: Links = "inside") -> Any:
    """Returns the contents of a YAML file as plain values.

    Raises:
      ValueError: the file is not valid YAML, has a duplicate key or an alias, or is too large or too deeply nested;
        the message names the file.
    """
    check_file(path, links=links, limit=LARGEST_YAML)
    check_not_utf16(path)
    content = path.read_bytes()
    try:
        values = yaml.load(content.decode("utf-8"), _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        advice = "" if isinstance(error, yaml.constructor.ConstructorError) else "; check the indentation"
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ValueError(f"{path}{position}: invalid YAML: {error.problem}{advice}") from None
    # PyYAML raises many types, for example on an invalid tag or date.
    except Exception as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if problem := find_problem(values):
        raise ValueError(f"{path} {problem}")
    return values


# Bytes: PyYAML can need a thousand times the size of the file in memory.
LARGEST_YAML = 2**16


class _StrictLoader(yaml.SafeLoader):
    """A `SafeLoader` that rejects aliases and duplicate keys, of which YAML silently takes the last."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Rejects aliases: with them a few lines can expand to a billion values."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases are not supported", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Rejects duplicate keys."""
        # A key that is a list is an error of the base class.
        if duplicates := repeated(key.value for key, _ in node.value if isinstance(key.value, str)):
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key {duplicates[0]!r}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _construct_number(loader: Any, node: Any) -> int | float:
    """Rejects numbers that YAML 1.1 reads in another base or with separators: 010 as 8, 1:30 as 90."""
    if re.search("[_:xb]|^[-+]?0[0-9]", node.value):
        problem = f"{node.value} is not a decimal number; write its decimal digits, or quotes around a text"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    try:
        is_int = node.tag.endswith("int")
        return parse_int(node.value) if is_int else loader.construct_yaml_float(node)
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_number)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that the loader would read as numbers."""


# PyYAML reads YAML 1.1, in which 1e-4 and 1.5e4 are text.
for _class in (_StrictLoader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        [*"-+.0123456789"],
    )


def to_yaml(values: Any) -> str:
    """Writes JSON values as YAML that `read_yaml` reads back, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def read_word(text: str) -> Any:
    """Parses a command-line value as YAML; invalid YAML is returned as text."""
    try:
        return yaml.load(text, _StrictLoader)
    except Exception:  # PyYAML raises many types
        return text
