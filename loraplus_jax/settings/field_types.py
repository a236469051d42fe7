"""Types of setting values: strict pydantic types with their bounds."""

from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, Strict, StringConstraints
from pydantic_core import PydanticCustomError

from .._utils.validation import in_float32

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
