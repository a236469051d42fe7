"""The fuzzing loop itself: it finds what it is there to find."""

import itertools
import json
import unittest.mock

import pytest

from .damage import MIB, check, data_limit, peak_limit

pytestmark = pytest.mark.slow


FAULTS = {
    "raises KeyError": KeyError("x"),
    "raises JSONDecodeError": json.JSONDecodeError("x", "y", 0),
    "does not name here.json": ValueError("of no file"),
    "cannot be printed": ValueError("here.json \ud800"),
    "says too much": ValueError("here.json" * 10_000),
}


def checked(read):
    check(10, lambda rng: b"bytes", read, limit=data_limit, names="here.json")


@pytest.mark.parametrize("message", FAULTS)
def test_an_error_that_is_not_ours_is_found(message):
    read = unittest.mock.Mock(side_effect=itertools.cycle((None, FAULTS[message])))
    with pytest.raises(AssertionError, match=f"(?s)1 kinds of failure.*case 1: {message}.*b'bytes'"):
        checked(read)
    for read in (list, lambda: int("here.json")):  # only reads, only refuses
        with pytest.raises(AssertionError, match="Counter"):
            checked(read)


@pytest.mark.parametrize("limit", [data_limit, peak_limit])
def test_a_reader_that_needs_too_much_memory_is_found(limit):
    def read(size):
        try:
            held = b"x" * size
        except MemoryError:
            raise ValueError("here.json is damaged") from None
        assert len(held) == size

    with limit(MIB):
        read(60 * MIB)
    with pytest.raises(AssertionError, match="needs too much memory"):
        check(2, lambda rng: bytes(MIB), lambda: read(512 * MIB), limit=limit, names="here.json")
