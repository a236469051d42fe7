"""Records: what was written is read, and what changed since is an error."""

import json
import math

import pytest

from loraplus_jax._utils.json_files import MAX_ROWS_BYTES
from loraplus_jax._utils.records import PATHS, check_files, read_record, record_text, write_record

from ..messages import mentions

CONTENT = {
    "loss": math.nan,
    "steps": (1, 2),
    "settings": {"model": {"path": "a", "pooling": "mean"}, "data": {"path": "b", "root": "c"}, "seed": 0},
}


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def record(tmp_path):
    write_record(tmp_path / "r.json", CONTENT)
    return tmp_path / "r.json"


def test_a_record_of_a_whole_sweep_needs_a_higher_limit(tmp_path):
    rows = {"rows": [f"{number:01000}" for number in range(1100)]}
    write_record(tmp_path / "r.json", rows)
    assert read_record(tmp_path / "r.json", limit=MAX_ROWS_BYTES)["rows"] == rows["rows"]
    with pytest.raises(ValueError, match=mentions("r.json", "too large")):
        read_record(tmp_path / "r.json")


def test_a_record_is_read_as_json_has_it(record):
    read = read_record(record)
    del read["digest"]
    assert read == {**CONTENT, "loss": None, "steps": [1, 2]}


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(loss=0.5),
        lambda c: c["settings"]["model"].update(pooling="cls"),
        lambda c: c["settings"].update(seed=1),
        lambda c: c.update(files={"x": "0"}),
    ],
)
def test_a_change_is_an_error_unless_the_digest_is_removed(record, edit):
    change(record, edit)
    with pytest.raises(ValueError, match=mentions("r.json", "changed", "digest")):
        read_record(record)
    read_record(change(record, lambda c: c.pop("digest")))


@pytest.mark.parametrize(
    "edit",
    [lambda c: c.update(loss=0.5), lambda c: c.pop("digest"), lambda c: c.clear(), lambda c: c.update(n=1)],
)
def test_with_a_remedy_a_digest_may_not_be_missing_and_every_error_ends_in_it(record, edit):
    def check(content):
        if "n" in content:
            raise ValueError("n is not of this record")

    assert read_record(record, check, remedy="train again")["steps"] == [1, 2]
    with pytest.raises(ValueError, match=r"restore it, or train again$"):
        read_record(change(record, edit), check, remedy="train again")
    record.write_text("{")
    with pytest.raises(ValueError, match=r"restore it, or train again$"):
        read_record(record, check, remedy="train again")


@pytest.mark.parametrize("name", PATHS)
def test_base_and_data_may_move(record, name):
    section, _, field = name.rpartition(".")

    def move(content):
        (content["settings"][section] if section else content["settings"])[field] = "/there"

    assert "/there" in str(read_record(change(record, move))["settings"])


def test_files_of_a_record_are_compared(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"abc")
    path = tmp_path / "r.json"
    path.write_text(record_text({"a": 1}, tmp_path, ["x.bin"]))
    check_files(path, read_record(path))
    (tmp_path / "x.bin").write_bytes(b"abd")
    with pytest.raises(ValueError, match=mentions("x.bin", "changed", "r.json")):
        check_files(path, read_record(path))
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ValueError, match=mentions("x.bin", "missing")):
        check_files(path, read_record(path))


@pytest.mark.parametrize(
    "files",
    [
        *(
            {name: "0"}
            for name in ("../secret", "a/b", "a\\b", "..", "", "x\0", "\n", "/proc/kmsg", "C:x", "link")
        ),
        ["secret"],
        "secret",
        None,
        {"here": 1},
        {"here": None},
        {"here": ["0"]},
        {"x" * 5000: "0"},
    ],
    ids=lambda files: f"{files!r:.20}",
)
def test_files_of_a_record_are_plain_names_beside_it(tmp_path, files):
    directory = tmp_path / "theirs"
    directory.mkdir()
    for path in (tmp_path / "secret", directory / "here"):
        path.write_text("")
    (directory / "link").symlink_to("../secret")
    write_record(directory / "r.json", {"files": files})
    with pytest.raises(ValueError, match=mentions(directory)) as caught:
        check_files(directory / "r.json", read_record(directory / "r.json"))
    assert "changed" not in str(caught.value)
