"""The child process of `untrusted`: runs one job a line and answers with one line; imports nothing of this package.

The bytes of arrays follow their line.

The parent starts this file by its path. A job limits itself before it begins: memory by `RLIMIT_AS`, CPU time by
`RLIMIT_CPU` and wall-clock time by an alarm, which end the process.
"""

import contextlib
import datetime
import functools
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NoReturn

try:
    import resource
except ImportError:  # Windows has no limits
    resource = None

MARKS = "\ufdd0", "\ufdd1"
"""Unicode noncharacters, not meant for text interchange, around the contents of {% generation %} blocks."""

DATE = datetime.datetime(2024, 7, 26)
"""The date that `strftime_now` formats: the fallback of Llama 3's template, so tokens do not depend on today."""

GROWTH = 32
"""How many characters or tokens a tokenizer may make of one: NFKC's longest decomposition has 18."""

PROBE = "".join(
    map(chr, [*range(9, 127), *range(127, 0x3000, 5), *range(0x3000, 0xD800, 97), 0xFDFA, 0x1F600])
)
PROBE = f"{PROBE} {'a' * 64} {' ' * 64} {'0' * 64} a b c https://a.b/c?d=e"


def render(source: str, calls: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Renders a chat template with the variables of each call; without calls only compiles it."""
    template = _compile(source)
    return [_render(template, source, variables) for variables in calls]


def _render(template: Any, source: str, variables: dict[str, Any]) -> str:
    text = template.render(variables)
    text.encode()  # raises ValueError for half a surrogate pair
    messages = variables.get("messages", ())
    given = sum(len(message["content"]) for message in messages)
    extra = [variables.get("tools"), *(message.get("tool_calls") for message in messages)]
    given += sum(len(json.dumps(value, ensure_ascii=False)) for value in extra if value)
    # A rendering may repeat the conversation's text and the template's own, but not without end.
    if len(text) > (limit := 4_096 + 4 * given + (len(messages) + 2) * len(source)):
        raise ValueError(f"it makes {len(text):,} characters of {given:,}; the limit is {limit:,}")
    return text


@functools.lru_cache(maxsize=2)
def _compile(source: str) -> Any:
    """The template in transformers' Jinja environment."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`, as in transformers: marks the assistant's text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in MARKS]
            return [marks[0], *body, marks[1]]

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        """Unlike Jinja's filter, does not escape HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"line {getattr(error, 'lineno', None) or 1}: {error}") from None


def try_tokenizer(source: str) -> None:
    """Loads a `tokenizer.json` and tries it on a text of many scripts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(source)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    normalized = tokenizer.normalizer.normalize_str(PROBE) if tokenizer.normalizer else PROBE
    ids = tokenizer.encode(PROBE).ids
    if max(len(normalized), len(ids)) > GROWTH * len(PROBE):
        raise ValueError(f"it makes more than {GROWTH} times as much of a text")
    tokenizer.decode(ids)


def match(patterns: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """For each name the indices of the patterns that match all of it."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return [[n for n, pattern in enumerate(compiled) if pattern.fullmatch(name)] for name in names]


def read_npz(path: str) -> dict[str, Any]:
    """The arrays of an npz file by name."""
    import numpy as np

    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("it is no archive of arrays")
    with arrays:
        if len({*arrays.files}) < len(arrays.files):
            raise ValueError("two arrays have one name")
        return dict(arrays.items())


def read_orbax(path: str) -> dict[str, Any]:
    """The leaves of an orbax checkpoint by path, joined by "/"."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    checkpointer = ocp.PyTreeCheckpointer()
    metadata: Any = checkpointer.metadata(path).item_metadata
    if metadata is None:
        raise ValueError("its metadata is missing or damaged")
    # As host arrays: the devices that saved them need not be here.
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree.leaves_with_path(checkpointer.restore(path, restore_args=as_numpy)):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if leaves.setdefault(name, leaf) is not leaf:
            raise ValueError(f"{name} is there twice")
    return leaves


def try_parquet(path: str, columns: Sequence[str] | None, limit: int) -> None:
    """Raises ValueError if the columns of a Parquet file need more than `limit` bytes, or cannot be read."""
    from pyarrow import parquet

    size = 0
    with parquet.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(1024, columns=columns, use_threads=False):
            size += batch.nbytes + 64 * batch.num_rows  # Python's objects need as much for small values
            if size > limit:
                raise ValueError(
                    f"its rows need more than {limit // 2**20} MiB; if you trust it, convert it to .jsonl"
                )


def _prepare(job: str) -> int:
    """Imports what a job needs, which the limits leave out; returns bytes of memory for its threads."""
    if job == "read_npz":
        import numpy as np  # noqa: F401
    if job == "try_parquet":
        os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve a gigabyte of addresses
        import pyarrow.parquet  # noqa: F401
    if job != "read_orbax":
        return 0
    if hasattr(os, "sched_setaffinity"):  # as many threads as processors, with a stack each
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:4])
    import jax
    import orbax.checkpoint  # noqa: F401

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    jax.devices()
    return 2**29


def _describe_arrays(arrays: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The name, dtype and shape of each array; makes them contiguous arrays in their dict."""
    import numpy as np

    described = []
    for name, leaf in arrays.items():
        arrays[name] = array = np.asarray(leaf, order="C")
        if array.dtype.hasobject or array.dtype.fields:
            raise ValueError(f"{name} is no array of numbers: {array.dtype}")
        # Those of ml_dtypes have only their names.
        is_plain = np.dtype(array.dtype.str) == array.dtype
        described.append((name, array.dtype.str if is_plain else array.dtype.name, array.shape))
    return described


@contextlib.contextmanager
def _limits(seconds: int, memory: int) -> Iterator[None]:
    """Limits a job: `seconds` of CPU time, twice that by the clock, `memory` bytes beside those in use."""
    if resource is None:
        yield
        return
    signal.alarm(2 * seconds)
    limits = {resource.RLIMIT_CPU: math.ceil(time.process_time()) + seconds}
    with contextlib.suppress(OSError), open("/proc/self/statm") as pages:  # only Linux has it
        limits[resource.RLIMIT_AS] = int(pages.read().split()[0]) * resource.getpagesize() + memory
    hard = {kind: resource.getrlimit(kind)[1] for kind in limits}
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, hard[kind]))
    try:
        yield
    finally:  # waiting for the next job, and reading it, are not limited
        signal.alarm(0)
        for kind in limits:
            resource.setrlimit(kind, (hard[kind], hard[kind]))


def _answer(line: bytes, output: BinaryIO) -> None:
    request, arrays = json.loads(line), {}
    try:
        memory = request["memory"] + _prepare(request["job"])
        with _limits(request["seconds"], memory):
            result: Any = JOBS[request["job"]](**request["arguments"])
            if isinstance(result, dict):
                answer, arrays = {"arrays": _describe_arrays(result)}, result
            else:
                answer = {"result": result}
            text = json.dumps(answer)
    except MemoryError:
        sys.exit(1)
    except BaseException as error:  # a panic of Rust is no Exception
        text = " ".join(f"{error}".split()) or type(error).__name__
        text, arrays = json.dumps({"error": text[:300]}), {}
    output.write(text.encode() + b"\n")
    for array in arrays.values():
        if array.nbytes:
            output.write(array.reshape(-1).view("u1"))
    output.flush()


JOBS = {job.__name__: job for job in (render, try_tokenizer, try_parquet, match, read_npz, read_orbax)}

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.stdin.buffer.readline())
    for request_line in sys.stdin.buffer:
        _answer(request_line, sys.stdout.buffer)
