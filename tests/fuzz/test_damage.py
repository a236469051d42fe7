"""The fuzzing loop itself: it finds what it is there to find."""

import itertools
import json

import pytest

from .damage import MIB, check, data_limit, peak_limit

pytestmark = pytest.mark.slow


def reader(error):
    """Reads every second case and fails at the others."""
    errors = itertools.cycle((None, error))

    def read():
        if raised := next(errors):
            raise raised

    return read


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("x"), "raises KeyError"),
        (json.JSONDecodeError("x", "y", 0), "raises JSONDecodeError"),
        (ValueError("of no file"), "does not name here.json"),
        (ValueError("here.json \ud800"), "cannot be printed"),
        (ValueError("here.json" * 10_000), "says too much"),
    ],
)
def test_an_error_that_is_not_ours_is_found(error, message):
    with pytest.raises(AssertionError, match=f"(?s)1 kinds of failure.*case 1: {message}.*b'bytes'"):
        check(10, lambda rng: b"bytes", reader(error), limit=data_limit, names="here.json")


@pytest.mark.parametrize("read", [list, lambda: int("here.json")])
def test_a_fuzz_that_only_reads_or_only_refuses_is_found(read):
    with pytest.raises(AssertionError, match="Counter"):
        check(10, lambda rng: b"bytes", read, limit=data_limit, names="here.json")


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
        check(2, lambda rng: bytes(MIB), lambda: read(80 * MIB), limit=limit, names="here.json")
