"""Untrusted YAML files: plain values only, and nothing that means more than it says."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..json_files import find_problem


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file, plain values only.

    Raises:
      ValueError: it is not YAML, a mapping has a key twice, there are aliases, or it is too large or too deep; the
        file is named.
    """
    if (size := path.stat().st_size) > LARGEST_YAML:
        raise ValueError(f"{path} has {size} bytes, at most {LARGEST_YAML} are read")
    content = path.read_bytes()
    try:
        values = yaml.load(content.decode("utf-8"), _UniqueKeys)
    except Exception as error:  # for a tag or a date that is wrong, PyYAML raises whatever it runs into
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if problem := find_problem(values):
        raise ValueError(f"{path} {problem}")
    return values


LARGEST_YAML = 2**16
"""Bytes. PyYAML needs up to a thousand times the bytes of a file."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of equal keys in silence; here that is an error."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As SafeLoader's, without aliases: with them a few lines can stand for a billion values."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's."""
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, takes 1e-4 for text.
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), [*"-+0123456789"]
)


def read_word(text: str) -> Any:
    """A value on the command line, read as in a YAML file; text that is not YAML is text."""
    try:
        return yaml.load(text, _UniqueKeys)
    except Exception:  # whatever PyYAML runs into
        return text
