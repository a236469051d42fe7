"""What records and sections may hold."""

import dataclasses

import pytest

from loraplus_jax._utils.field_types import Count, check_requirements, check_schema

from ..refusals import refusals


def checked(**content):
    return lambda: check_schema(dict[str, Count], content, "rows.json")


test_what_a_record_does_not_hold_is_named = refusals(
    (checked(step=0), "rows.json", "step", "0"),
    (checked(step=True), "rows.json", "step", "True"),
    (checked(step="1"), "rows.json", "step", "1"),
)


def test_a_record_keeps_its_values():
    assert checked(step=2)() == {"step": 2}


@dataclasses.dataclass
class Section:
    kind: str = "a"
    limit: int | None = None
    size: int = 1


REQUIREMENTS = ((("part.size",), "part.kind", ("b",)), (("part.size",), "part.limit", ()))


@pytest.mark.parametrize(
    ("values", "needed"),
    [({"size": 2, "limit": 1}, "part.kind"), ({"size": 2, "kind": "b"}, "part.limit"), ({"limit": 1}, None)],
)
def test_a_field_requires_others(values, needed):
    act = lambda: check_requirements(Section(**values), REQUIREMENTS, "part.")  # noqa: E731
    if needed is None:
        act()
    else:
        with pytest.raises(ValueError, match=f"part.size requires {needed}"):
            act()
