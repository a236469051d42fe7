import json
import math

import numpy as np
import pytest

from loraplus_jax.training.metrics_log import METRICS, RunLog, draw_loss, smooth

from ..messages import mentions


def log_of(directory, rows, **kwargs):
    log = RunLog(directory, **kwargs)
    for step, values in rows:
        log.write(step, values)
    return log


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_step_that_a_run_resumes_from_are_dropped(tmp_path):
    log_of(tmp_path, [(0, {"x": 0}), (5, {"x": 5}), (10, {"x": 10}), (10, {"y": 1}), (11, {"x": 11})]).close()
    log = RunLog(tmp_path, keep=4)
    assert [row["step"] for row in log.rows] == [0, 5, 10, 10]
    log.write(11, {"x": 12})
    log.close()
    assert [(row["step"], row.get("x")) for row in read_rows(tmp_path / METRICS)][-2:] == [
        (10, None),
        (11, 12.0),
    ]
    start = RunLog(tmp_path)
    assert start.rows == []
    start.close()


@pytest.mark.parametrize("tail", ["", '{"st', '{"step": 3, "x": 1}'])
def test_a_last_line_without_its_end_is_left_out(tmp_path, tail):
    path = tmp_path / METRICS
    path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n' + tail)
    log = log_of(tmp_path, [(3, {"x": 3})], keep=2)
    log.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def swap_rows(data):
    first, second, *rest = data.splitlines(keepends=True)
    return b"".join([second, first, *rest])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.replace(b"2.0", b"2.5"),
        swap_rows,
        lambda data: data.replace(b"\n", b"", 1),
        lambda data: b"5\n" + data,
        lambda data: data.replace(b": 1.0", b":  1.0"),
        lambda data: b"",
        None,
    ],
)
def test_rows_that_are_not_those_of_the_checkpoint_are_rejected_and_left_alone(tmp_path, spoil):
    path = tmp_path / METRICS
    log = log_of(tmp_path, [(1, {"x": 1.0}), (2, {"x": 2.0})])
    digest = log.digest()
    log.write(3, {"x": 3.0})
    log.close()
    log = RunLog(tmp_path, keep=2, digest=digest)
    assert (log.digest(), [row["step"] for row in log.rows]) == (digest, [1, 2])
    log.close()
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes()))
    spoilt = path.read_bytes() if path.exists() else None
    for writes in (True, False):  # the other processes of a run read the rows too
        with pytest.raises(ValueError, match=mentions(path, 2, "--fresh")):
            RunLog(tmp_path, keep=2, digest=digest, writes=writes)
    assert (path.read_bytes() if path.exists() else None) == spoilt


def test_a_digest_covers_rows_from_before_and_after_a_resume(tmp_path):
    rows = [(1, {"x": 1.0}), (2, {"x": math.nan}), (3, {"x": 0.1})]
    straight = log_of(tmp_path, rows)
    straight.close()
    before = log_of(tmp_path, rows[:2])
    before.close()
    resumed = log_of(tmp_path, rows[2:], keep=2, digest=before.digest())
    resumed.close()
    reader = log_of(tmp_path, rows[2:], keep=2, digest=before.digest(), writes=False)
    assert straight.digest() == resumed.digest() == reader.digest() != before.digest()


@pytest.mark.parametrize("value", [np.float32("nan"), -math.inf])
def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_in_memory(tmp_path, value):
    log = log_of(tmp_path, [(1, {"loss": value, "x": 0.5}), (2, {"loss": 1.0})])
    log.close()
    assert read_rows(tmp_path / METRICS) == [{"step": 1, "loss": None, "x": 0.5}, {"step": 2, "loss": 1.0}]
    again = RunLog(tmp_path, keep=2)
    again.close()
    for rows in (log, again):
        assert str(rows.values("loss")) == "[(1, nan), (2, 1.0)]"
    draw_loss(tmp_path / "loss.png", again, "accuracy", "a title")


def test_no_row_is_written_where_the_directory_is_gone(tmp_path):
    def check():
        raise ValueError("gone")

    log = log_of(tmp_path, [], check=check)
    for write in (lambda: log.write(1, {"x": 1.0}), log.sync):
        with pytest.raises(ValueError, match="gone"):
            write()
    log.close()
    assert read_rows(tmp_path / METRICS) == []


@pytest.mark.slow
def test_the_picture_shows_its_curves(tmp_path):
    import matplotlib.image

    rows = [(step, {"loss": 1 / step}) for step in range(1, 21)]
    rows += [(n, {"validation/loss": 0.3, "validation/accuracy": 0.7}) for n in (10, 20)]
    log = log_of(tmp_path, rows)
    draw_loss(tmp_path / "full.png", log, "accuracy", r"$\frac$ a title")
    log.close()
    (tmp_path / "empty").mkdir()
    empty = log_of(tmp_path / "empty", [])
    draw_loss(tmp_path / "bare.png", empty, "accuracy", "a title")
    empty.close()
    full, bare = (matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3] for name in ("full", "bare"))
    assert full.shape == (480, 1200, 3)
    for part in (slice(0, 600), slice(600, 1200)):  # orange in both halves, blue in the left
        assert count(full[:, part], [1.0, 0.498, 0.055]) > 50
    blue = [0.122, 0.467, 0.706]
    assert count(full[:, :600], blue) > 200 > count(full[:, 600:], blue)
    assert count(bare, blue) < count(full, blue) / 2
    assert not list(tmp_path.glob(".*"))


def count(picture, colour):
    return int(np.sum(np.all(np.abs(picture - np.array(colour)) < 0.02, axis=-1)))


def test_smoothing_by_hand():
    assert smooth([]) == []
    assert smooth([3.0]) == [3.0]
    assert smooth([1.0, 0.0, 2.0], weight=0.5) == pytest.approx([1.0, 0.5 / 1.5, (0.25 + 2.0) / 1.75])
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
