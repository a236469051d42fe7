"""Six thousand damaged data files: CSV, TSV and JSON lines, faults of bytes and of form."""

import csv
import io
import json

import pytest

from loraplus_jax.data.readers import read_rows

from .damage import BYTES, check, damaged, data_limit, odd_json

pytestmark = pytest.mark.slow

ROWS = [
    {"id": str(n), "text": text, "label": "good" if n % 2 else "bad", "rest": "x"}
    for n, text in enumerate(
        ("One, two", 'He said "so".', "two\nlines", "é😀", " tail ", "\tx", "a" * 300), 1
    )
]
COLUMNS = ("text", "label")
NEAR_THE_LIMIT = tuple("[" * n + "]" * n for n in range(880, 1000, 3))
SCRAPS = (
    *BYTES,
    *(b"\r\r", b'""', b'"\n', b"\xef\xbb\xbf\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\x0c", b"\x1c"),
    *(b"1" * 5000, b"\n" * 2000, b'"' * 2001, b"," * 2000, b"\x00" * 500, b"a,b\n" * 500),
    *(b'{"text":"a"}\n' * 500, b"x" * 140_000, b'"' + b"x,\n" * 50_000),
    *("é".encode("latin-1"), "text\n".encode("utf-16")),
)


def table(delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def odd_table(rng, data, delimiter):
    """Scraps in places of the table where they mean something."""
    at = rng.choice(
        [n for n, byte in enumerate(data) if byte in b'\n"' + delimiter.encode()] + [0, len(data)]
    )
    cut = rng.choice((0, 0, 1))
    return data[:at] + rng.choice(SCRAPS) + data[at + cut :]


def odd_lines(rng):
    lines = [json.dumps(row).encode() for row in ROWS]
    line = rng.randrange(len(lines))
    values = NEAR_THE_LIMIT if not rng.randrange(5) else None
    odd = odd_json(rng, ROWS[line], values) if values else odd_json(rng, ROWS[line])
    lines[line] = rng.choice(
        (odd.encode(errors="surrogatepass"), odd.encode(errors="surrogatepass"), rng.choice(SCRAPS))
    )
    return rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_damaged_data_file(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    delimiter = {"csv": ",", "tsv": "\t"}.get(suffix)
    data = table(delimiter) if delimiter else "\n".join(map(json.dumps, ROWS)).encode()

    def make(rng):
        if rng.randrange(2):
            content = damaged(rng, data)
        else:
            content = odd_table(rng, data, delimiter) if delimiter else odd_lines(rng)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return content

    def read():
        rows = read_rows(path, COLUMNS)
        assert all(set(row.values) == set(COLUMNS) for row in rows)
        assert all(value.strip() and value.encode() for row in rows for value in row.values.values())

    check(2000, make, read, limit=data_limit, names=path.name)
