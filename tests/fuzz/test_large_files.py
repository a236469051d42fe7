"""Files dense with small values, for which Python needs far more than their size."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from loraplus_jax._utils.json_files import MAX_JSON_BYTES, MAX_ROWS_BYTES, read_json
from loraplus_jax._utils.records import read_record
from loraplus_jax._utils.yaml_files import LARGEST_YAML, read_yaml
from loraplus_jax.data.data_to_text import read_descriptions
from loraplus_jax.data.readers import read_rows
from loraplus_jax.models.checkpoints.hub_directory import SINGLE_FILE
from loraplus_jax.models.checkpoints.name_table import NameTable
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.files import open_files

from ..messages import assert_mentions, mentions
from .damage import MIB, data_limit

pytestmark = pytest.mark.slow


def filled(path, size, first, part, last):
    """A file of at most `size` bytes, as many `part` as fit."""
    count = (size - len(first) - len(last)) // len(part)
    path.write_bytes(first + part * count + last)
    return path


def outcome(read, path):
    """What the reader made of the file within the memory that it may need: a short message, or None."""
    with data_limit(path.stat().st_size):
        try:
            read(path)
        except ValueError as error:
            return str(error)
    return None


def read_texts(path):
    read_rows(path, ("text", "label"))


JSON, YAML = ('{"a": ["😀",'.encode(), b"0]}"), (b"a: [", b"a]")
IN_JSON = (b"[],", b'{"":{}},', b"1.5,", b'"ab",')
IN_CSV = (b"a\n", b"\xff\n", b"\n", b'"\n', b",", b"a,b,c\n", b"\x00")
IN_JSONL = (b"{}\n", b"[", b'{"text":1}\n', b"\n")


@pytest.mark.parametrize(
    ("name", "read", "size", "ends", "part"),
    [
        *(("config.json", read_json, MAX_JSON_BYTES, JSON, part) for part in IN_JSON),
        *(("a.yaml", read_yaml, LARGEST_YAML, YAML, part) for part in (b"a,", b"[],", b"{a: b},")),
        *(("data.csv", read_texts, MIB, (b"text,label\n", b""), part) for part in IN_CSV),
        *(("data.jsonl", read_texts, MIB, (b"", b""), part) for part in IN_JSONL),
    ],
)
def test_the_largest_configs_are_read_and_data_that_is_wrong_throughout_rejected(
    tmp_path, name, read, size, ends, part
):
    message = outcome(read, filled(tmp_path / name, size, ends[0], part, ends[1]))
    assert f"{name}:" in message if name.startswith("data") else message is None


def test_larger_files_are_rejected_unread(tmp_path):
    for name, read in (("config.json", read_json), ("config.yaml", read_yaml)):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(200 * MIB)
        assert_mentions(outcome(read, path), path, 200 * MIB)


def test_a_header_of_very_many_tensors(tmp_path):
    entry = '"{:07x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = ("{" + ",".join(entry.format(n) for n in range(60_000)) + "}").encode()
    path = tmp_path / SINGLE_FILE
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    found = outcome(lambda path: load_params(open_files(path.parent), NameTable(rules=()), {}), path)
    assert_mentions(found, tmp_path, "60000 extra")
    assert len(found) < 5000


def test_yaml_whose_aliases_stand_for_a_billion_values(tmp_path):
    path = tmp_path / "config.yaml"
    lists = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
    path.write_text("\n".join(lists))
    assert_mentions(outcome(read_yaml, path), path, "aliases")


WIDE = ",".join(f"{n:x}" for n in range(100_000))
NAMES = ",".join(f'"{n:x}":1' for n in range(100_000))
QUADRATIC = {
    "wide.csv": (f"{WIDE}\n{WIDE}\n", "text"),
    "wide_twice.csv": (f"{WIDE},text,label,text\n", "twice"),
    "names.jsonl": (f'{{{NAMES},"text":1,"text":2}}\n', "text"),
    "float.yaml": ("seed: " + "1" * 60_000 + "e\n", None),
    "keys.yaml": ("{" + ",".join(f"{n:x}" for n in range(12_000)) + ",a: 1}\n", "duplicate"),
    "slots.csv": ("mr,ref\n" + " " * 10**6 + "x],a\n", "slot[value]"),
}
"""Files that the length of a line or the number of its parts made slow, by its square or cube."""


@pytest.mark.parametrize("name", QUADRATIC)
def test_the_time_of_a_long_line_grows_with_its_length(tmp_path, ten_seconds, name):
    content, word = QUADRATIC[name]
    read = read_yaml if name.endswith("yaml") else read_descriptions if name == "slots.csv" else read_texts
    (tmp_path / name).write_text(content)
    message = outcome(read, tmp_path / name)
    assert message is None if word is None else word in message


def repeats(count):
    """Equal values, which a dictionary of one and their number stand for."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(count, np.int32)), ["x" * MIB])


PARQUET = {
    "rows": lambda: {"text": repeats(2_000), "label": ["a"] * 2_000},
    "one row": lambda: {
        "text": pyarrow.ListArray.from_arrays(pyarrow.array([0, 2_000], pyarrow.int32()), repeats(2_000)),
        "label": ["a"],
    },
    "many": lambda: dict.fromkeys(("text", "label"), pyarrow.array(np.zeros(10**7, np.int8))),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_that_unpacks_to_gigabytes_is_rejected(tmp_path, ten_seconds, name):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(PARQUET[name]()), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < MIB
    assert_mentions(outcome(read_texts, path), path, "MiB")


@pytest.mark.parametrize(("part", "limit"), [(b"", MAX_ROWS_BYTES), (b"[],", "8,388,608")])
def test_records_that_would_fill_the_memory_are_rejected(tmp_path, ten_seconds, part, limit):
    path = tmp_path / "result.json"
    if part:
        filled(path, 2**25, b'{"a": [', part, b"0]}")
    else:
        with path.open("wb") as file:
            file.truncate(MAX_ROWS_BYTES + 1)
    assert_mentions(outcome(lambda path: read_record(path, limit=MAX_ROWS_BYTES), path), path, limit)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_texts_of_a_model_that_would_fill_the_memory_are_rejected(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(5 * 2**30)  # takes no space on the disk
    files = open_files(tmp_path)
    read = {"tokenizer.json": lambda _: files.tokenizer, "chat_template.jinja": lambda _: files.chat_template}
    with pytest.raises(ValueError, match=mentions(tmp_path / name, 5 * 2**30)):
        read[name](tmp_path)
