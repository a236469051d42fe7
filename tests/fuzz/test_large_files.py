"""Files dense with small values, for which Python needs far more than their size."""

import pytest

from loraplus_jax._utils.json_files import MAX_JSON_BYTES, read_json
from loraplus_jax.data.readers import read_rows
from loraplus_jax.models.checkpoints.hub_directory import SINGLE_FILE
from loraplus_jax.models.checkpoints.name_table import NameTable
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.files import open_files
from loraplus_jax.settings.yaml_files import LARGEST_YAML, read_yaml

from ..messages import assert_mentions
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
