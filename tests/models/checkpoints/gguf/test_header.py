"""The header of a GGUF file: nothing in it is believed before it is checked."""

import re
import struct

import gguf as package
import numpy as np
import pytest

from loraplus_jax.models.checkpoints.gguf.header import read
from loraplus_jax.models.files import open_files

from ....messages import mentions
from ....refusals import refusals
from .files import metadata, tensors, write


def u64(*numbers):
    return struct.pack(f"<{len(numbers)}Q", *numbers)


START = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"GG", "begins with b'GG'"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"GGUF", "4 bytes"),
        (b"GGUF" + struct.pack(">I", 3) + u64(0, 0), "little-endian"),
        (START + u64(2**40, 0), f"{2**40} tensors"),
        (START + u64(0, 2**64 - 1), f"{2**64 - 1} metadata entries"),
        (START + u64(0, 1, 2**63) + bytes(20), f"{2**63} bytes"),
        (START + u64(0, 1, 1) + b"k" + struct.pack("<II", 9, 8) + u64(2**61), f"{2**61} strings"),
        (START + u64(0, 1, 1) + b"k" + struct.pack("<II", 9, 6) + u64(2**62), f"{2**62} numbers"),
        (START + u64(0, 1, 1) + b"k" + struct.pack("<II", 9, 9) + u64(1), "type 9"),
        (START + u64(0, 1, 1) + b"\xff" + bytes(13), "UTF-8"),
        (START + u64(0, 2) + 2 * (u64(1) + b"k" + struct.pack("<IB", 0, 1)), "'k'"),
        (START + u64(1, 0, 1) + b"t" + struct.pack("<I", 5) + bytes(60), "5 dimensions"),
        (START + u64(1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 0, 0, 0), "[0]"),
        (START + u64(1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 2**63, 0, 0), f"{2**65 + 64}"),
        (START + u64(1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 8, 2, 0), "blocks of 32"),
        (START + u64(1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 1, 0, 2**64 - 32), "byte"),
    ],
)
def test_a_header_is_checked_before_it_is_used(tmp_path, content, fault):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(fault)) as caught:
        assert open_files(tmp_path / "m.gguf").config
    assert str(tmp_path / "m.gguf") in str(caught.value)


@pytest.mark.parametrize("cut", [-1, -4000, 600, 30])
def test_truncated_files_are_named(tmp_path, cut):
    whole = write(tmp_path / "m.gguf", tensors()).read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=mentions(tmp_path / "m.gguf", "GGUF")):
        read(tmp_path / "m.gguf")


def with_value(key, value):
    """A file of one more key, which the package's writer would not write: it is written by another name first."""

    def call(tmp_path):
        path = write(tmp_path / "m.gguf", tensors(), metadata() | {f"{key[:-1]}x": value})
        path.write_bytes(path.read_bytes().replace(f"{key[:-1]}x".encode(), key.encode()))
        read(path)

    return call


test_unsupported_metadata_of_the_file_itself = refusals(
    (with_value("split.count", [1, 2]), "m.gguf", "split.count", 2),
    (with_value("split.count", 3), "3 parts"),
    (with_value("general.alignment", 24), "alignment", 24),
)


def test_the_header_is_what_the_packages_own_reader_reads(tmp_path):
    values = metadata() | {"a.list": ["x", "é"], "a.numbers": [1, 2], "a.flag": True, "a.text": "ü"}
    path = write(tmp_path / "m.gguf", tensors(), values)
    ours, theirs = read(path), package.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            found = ours.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == pytest.approx(
                field.contents()
            )
    assert {t.name: (tuple(reversed(t.shape)), t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        name: (t.shape, t.start, t.size) for name, t in ours.tensors.items()
    }
