"""Damage to files, drawn from a seed, and the loop that holds a reader to its word about damaged files.

A reader may succeed, or raise one of the errors it documents, with a message that names the file. It may not raise
anything else, nor need more memory than 4 x the file's size + 64 MiB, nor more than ten seconds.
"""

import collections
import contextlib
import ctypes
import json
import os
import random
import re
import resource
import sys
import time
from pathlib import Path

MIB = 2**20
TOKEN = "@@odd@@"


def words(text, by=None):
    """The parts of a text, by spaces or by what else is between them."""
    return tuple(text.split(by))


BYTES = (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", *(bytes([n]) for n in b'\r\n"{}[]:,'))
NUMBERS = (*words("NaN -Infinity 1e999 -0 -1 0 2.5 4294967296"), "9" * 30, "-" + "9" * 400, "9" * 5000)
WORDS = (*words(r'null true "" "x" "/" "a/b" ".." "\u0000" "\ud800" "é😀"'), '"' + "x" * 300 + '"')
TREES = ("[]", "{}", "[[]]", '{"a": {"b": 1}}', '["x", 1]', "[-1, 3]", "[4294967296, 4294967296, 4294967296]")
DEEP = tuple(left * n + right * n for left, right in ("[]", ('{"a":', "1}")) for n in (200, 950, 980, 3000))
JSON_VALUES = (*NUMBERS, *WORDS, *TREES, *DEEP)
JSON_KEYS = ("", *words("/ .. ../x a/b /a a/ \x00", " "), "\n", *words("é \ud800 id __metadata__"), "x" * 300)


def damaged(rng, data, end=None):
    """One to four faults in the first `end` bytes; a cut takes all that follows with it."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(min(end or len(data), len(data)) or 1)
        size = rng.choice((1, 2, 8, 64))
        part = data[at : at + size]
        data = rng.choice(
            (
                data[:at] + bytes([part[0] ^ 1 << rng.randrange(8)] if part else b"") + data[at + 1 :],
                data[:at] + rng.randbytes(len(part)) + data[at + size :],
                data[:at] + rng.choice(BYTES) + data[at:],
                data[:at] + rng.choice(BYTES) + data[at + 1 :],
                data[:at] + part * rng.choice((2, 3, 50)) + data[at + size :],
                data[:at] + data[at + size :],
                data[:at],
            )
        )
    return data


def odd_json(rng, tree, values=JSON_VALUES, keys=JSON_KEYS):
    """A JSON text of the tree with one place of it gone wrong: a value, a key, or a key that stands twice."""
    tree = json.loads(json.dumps(tree))
    place, key = rng.choice(list(_places(tree)))
    what = rng.choice(("value", "value", "value", "key", "twice", "gone"))
    if what == "gone":
        del place[key]
    elif what == "value" or isinstance(place, list):
        place[key] = TOKEN
    elif what == "key":
        place[rng.choice(keys)] = place.pop(key)
    else:
        place[TOKEN] = 0
        return json.dumps(tree).replace(f'"{TOKEN}"', json.dumps(key), 1)
    return json.dumps(tree).replace(f'"{TOKEN}"', rng.choice(values), 1)


def _places(tree):
    """Every container of the tree with every key or index that it has."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def check(cases, make, read, *, limit, names="", ours=(ValueError,)):
    """Reads `cases` damaged files one after the other; returns how many were read and how many refused.

    Args:
      cases: how many; `LORAPLUS_FUZZ=0.2` makes it a fifth of that where it is many.
      make: called with a random generator, writes a damaged file and returns its bytes.
      read: reads that file.
      limit: `data_limit` or `peak_limit`.
      names: a regular expression that finds the file in the message of an error.
      ours: the classes an error may have; a subclass will not do, as those of ValueError come from libraries.
    """
    counts, failures = collections.Counter(), {}
    cases = max(min(cases, 100), int(cases * float(os.environ.get("LORAPLUS_FUZZ", "1"))))
    for case in range(cases):
        # Also what reproduces a case alone: Random(case). A reader that kills the process leaves the file behind.
        data = make(random.Random(case))
        start = time.monotonic()
        try:
            with limit(len(data)):
                read()
            counts["read"] += 1
        except Exception as error:
            counts["refused"] += 1
            if fault := _fault(error, names, ours):
                failures.setdefault(fault[:60], f"case {case}: {fault}\n  {_short(data)}")
        if (seconds := time.monotonic() - start) > 10:
            failures.setdefault("slow", f"case {case}: takes {seconds:.0f} s\n  {_short(data)}")
    print(dict(counts))
    assert not failures, "\n".join([f"{len(failures)} kinds of failure", *failures.values()])
    assert counts["read"] > cases / 1000, counts
    assert counts["refused"] > cases / 10, counts
    return counts


def _fault(error, names, ours):
    """What is wrong with an error, if anything."""
    text = str(error)
    if any(isinstance(e, MemoryError) or "out of memory" in str(e).lower() for e in _chain(error)):
        return f"needs too much memory: {error!r:.300}"
    if type(error) not in ours:
        return f"raises {error!r:.300}"
    if not re.search(names, text):
        return f"does not name {names}: {text:.300}"
    if len(text) > 20_000:
        return f"says too much, {len(text)} characters: {text:.300}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"cannot be printed: {text!r:.300}"
    return None


def _chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(data):
    text = repr(data)
    return text if len(text) < 1500 else f"{text[:1000]} ... {text[-400:]} ({len(data)} bytes)"


def _give_back():
    """What tests in this process freed: a large block that comes from it would not count."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


@contextlib.contextmanager
def data_limit(size):
    """The kernel refuses this process more than 4 x `size` + 64 MiB on top of the memory it has."""
    _give_back()
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + 4 * size + 64 * MIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def peak_limit(size):
    """As `data_limit`, measured afterwards: for readers whose threads would not survive a refusal."""
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    try:
        yield
    finally:
        if (grown := _peak() - before) > 4 * size + 64 * MIB:
            raise MemoryError(f"{grown / MIB:.0f} MiB for {size} bytes")


def _peak():
    """The largest resident size since `clear_refs`, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
