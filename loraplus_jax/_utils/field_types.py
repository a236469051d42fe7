"""What pydantic validates: strict types of values with their bounds, fields that require others, and records."""

import functools
import operator
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from .validation import in_float32, join_first

SECTION = ConfigDict(extra="forbid")
"""The pydantic configuration of every section."""


def _check_float32(value: float) -> float:
    # XLA computes in float32, where 1 - 1e-9 rounds to 1 and 1e-60 to 0.
    if not in_float32(value) or (value < 1 <= np.float32(value)):
        raise PydanticCustomError("float32", "float32 cannot represent it")
    return value


def _check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "values must be distinct")
    return values


# Strict: otherwise pydantic accepts true as 1 and "2" as 2.
Switch = Annotated[bool, Strict()]
Int = Annotated[int, Strict()]
Index = Annotated[Int, Field(ge=0, lt=2**63)]
Count = Annotated[Int, Field(ge=1, lt=2**63)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False), AfterValidator(_check_float32)]
Rate = Annotated[Number, Field(gt=0)]
Decay = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Fraction = Annotated[Number, Field(gt=0, lt=1)]
Text = Annotated[str, StringConstraints(pattern=r"\S")]
Distinct = AfterValidator(_check_distinct)

Requirement = tuple[tuple[str, ...], str, tuple[Any, ...]]
"""Fields that have no effect unless another field has one of these values; () stands for any but null and 0."""


def check_requirements(values: Any, requirements: Sequence[Requirement], section: str = "") -> None:
    """Raises ValueError if a field is set that has no effect.

    Args:
      values: the settings, or one of their sections.
      requirements: what its fields require.
      section: the prefix of the section's fields.
    """
    for names, needed, allowed in requirements:
        value = operator.attrgetter(needed.removeprefix(section))(values)
        for name in () if (value in allowed if allowed else value) else names:
            *owners, field = name.removeprefix(section).split(".")
            owner = functools.reduce(getattr, owners, values)
            if getattr(owner, field) != owner.__dataclass_fields__[field].default:
                wanted = " or ".join("null" if x is None else x for x in allowed) or "to be set"
                given = "null" if value is None else value
                raise ValueError(f"{name} requires {needed} {wanted}; it has no effect with {needed} {given}")


def check_schema(schema: Any, content: Any, name: object) -> Any:
    """Returns what a file holds as a type that pydantic validates, or raises ValueError with the file's name."""
    try:
        return _type_adapter(schema).validate_python(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}"
            + (f", got {problem['input']!r:.80}" if problem["type"] != "missing" else "")
            + ("; put it in quotes" if problem["type"] == "string_type" else "")  # YAML's numbers and dates
            for problem in error.errors(include_url=False)
        ]
        raise ValueError(f"{name}: {join_first(problems)}") from None


_type_adapter = functools.cache(TypeAdapter)
