"""Types of settings' values: what pydantic accepts for them, strictly, and how an error says so."""

from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, Strict, StringConstraints
from pydantic_core import PydanticCustomError

from .._validation import in_float32

SECTION = ConfigDict(extra="forbid")
"""How every section is validated."""


def _check_float32(value: float) -> float:
    # XLA computes in float32, for which 1 - 1e-9 is 1 and 1e-60 is 0.
    if not in_float32(value) or (value < 1 <= np.float32(value)):
        raise PydanticCustomError("float32", "float32 cannot hold it")
    return value


def _check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "values must differ")
    return values


# Strict, or pydantic would take true for 1 and "2" for 2.
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
