"""Checks of numbers and paths, and the names that an error suggests."""

import pytest

from loraplus_jax._utils.validation import check_int, check_number, suggest

from ..messages import mentions


def test_nearest_falls_back_to_the_whole_list():
    assert suggest("qurey", ["value", "query"]) == "; did you mean 'query'?"
    assert suggest("zzz", ["value", "query"]) == "; known: query, value"
    assert suggest("zzz", ["value"], fallback=False) == ""


def test_an_int_that_no_float_or_no_64_bits_can_hold_is_rejected():
    check_number("alpha", 10**38)
    with pytest.raises(ValueError, match=r"alpha.*1000"):
        check_number("alpha", 10**400)
    for value in (10**39, 1e300, -1e-60):
        with pytest.raises(ValueError, match=mentions("alpha", repr(value), "float32")):
            check_number("alpha", value)
    check_int("rank", 2**63 - 1, at_least=1)
    with pytest.raises(ValueError, match=mentions("rank", "2**63", 2**63)):
        check_int("rank", 2**63, at_least=1)
