"""Commands on a mesh, of one process and of two, give what one device gives."""

import json
import sys

import jax
import numpy as np
import pytest

from loraplus_jax.inference.devices import choose_mesh
from loraplus_jax.inference.eval_tasks import evaluate_tasks
from loraplus_jax.inference.generate import generate_answers
from loraplus_jax.inference.predict import evaluate_run, load_tuned, predict_run
from loraplus_jax.settings.schema import MeshSettings

from ..integration.runs import PROMPT, assert_one_error, lines_of
from ..integration.test_processes import ended, ending, free_address, member, spawn
from ..messages import mentions
from .test_eval_tasks import write_tasks

pytestmark = pytest.mark.usefixtures("cache")
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
PROMPTS = [PROMPT, "tell me what colour is coal", "what colour is grass now"]


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ({}, (8, 1, 1)),
        (MESH, (2, 2, 2)),
        ({"data": 4}, (4, 1, 1)),
        ({"data": 3}, (8, 1, 1)),
        ({"data": 1, "fsdp": 16}, (1, 8, 1)),
        ({"data": 2, "tensor": 8}, (1, 8, 1)),
    ],
)
def test_the_mesh_is_that_of_the_run_if_the_devices_allow_it(capsys, trained, expected):
    mesh = choose_mesh(MeshSettings(**trained))
    assert tuple(mesh.shape.values()) == expected
    warned = capsys.readouterr().err
    assert bool(warned) == (expected != (2, 2, 2) and bool({3, 16, 8} & {*trained.values()}))
    if warned:
        assert all(f"{axis} {size}" in warned for axis, size in trained.items())


def test_changes_to_the_mesh_must_fit(capsys):
    trained = MeshSettings(data=1, fsdp=4)
    assert tuple(choose_mesh(trained, {"data": -1}).shape.values()) == (2, 4, 1)
    with pytest.raises(ValueError, match=mentions("mesh", "3", 8)):
        choose_mesh(trained, {"data": 3})
    assert capsys.readouterr().err == ""


def near(given, wanted):
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        assert given[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


@pytest.mark.slow
def test_a_language_model_on_a_mesh_evaluates_and_answers_as_on_one_device(untrained_talk):
    out = untrained_talk.out
    near(evaluate_run(out, mesh=MESH), evaluate_run(out))
    answers = [generate_answers(str(out), prompts=PROMPTS, max_tokens=8, mesh=m) for m in (None, MESH)]
    assert answers[0] == answers[1]
    assert len({row["answer"] for row in answers[0]}) == len(PROMPTS)


@pytest.mark.slow
def test_an_encoder_on_a_mesh_predicts_as_on_one_device(untrained):
    out, data = untrained.out, str(untrained.data)
    near(evaluate_run(out, mesh=MESH), evaluate_run(out))
    rows = [predict_run(out, data=data, mesh=mesh) for mesh in (None, MESH)]
    assert [row["prediction"] for row in rows[0]] == [row["prediction"] for row in rows[1]]
    shares = [[list(row["probabilities"].values()) for row in part] for part in rows]
    np.testing.assert_allclose(*shares, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_device_holds_its_part_of_the_weights_alone(untrained_talk):
    def bytes_of(mesh):
        leaves = jax.tree.leaves(load_tuned(untrained_talk.out, mesh=mesh).variables)
        assert all(len(x.addressable_shards) in (1, 8) for x in leaves)
        return sum(x.addressable_shards[0].data.nbytes for x in leaves)

    whole = bytes_of(None)
    assert bytes_of({"data": 8}) == whole
    # Norms, scales of packed weights, and the narrow side of factors are whole on every device.
    assert bytes_of({"fsdp": 8}) < 0.35 * whole
    assert bytes_of(MESH) < 0.5 * whole


# Several processes


def run_two(*words, devices, within=300, own=((), ())):
    address = free_address()
    command = [sys.executable, "-m", "loraplus_jax.cli", *map(str, words)]
    pair = [spawn([*command, *member(n, address), *map(str, own[n])], devices) for n in range(2)]
    with ending(pair):
        return [ended(process, within) for process in pair]


def output_of(*words, devices):
    """What process 0 prints; the other prints nothing."""
    ends = run_two(*words, devices=devices)
    assert [end[0] for end in ends] == [0, 0], ends
    assert not ends[1][1].strip()  # the lines of Gloo, which are left out, may end twice
    return ends[0][1]


SPLIT = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")


@pytest.mark.long
def test_two_processes_predict_and_evaluate_what_one_device_does(untrained, tmp_path):
    out, data, file = untrained.out, untrained.data, tmp_path / "rows.jsonl"
    assert output_of("predict", out, "--data", data, "--output", file, *SPLIT, devices=4) == ""
    rows, expected = lines_of(file), predict_run(out, data=str(data))
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in expected]
    near(json.loads(output_of("eval", out, *SPLIT, devices=4)), evaluate_run(out))


@pytest.mark.slow
def test_two_processes_answer_and_evaluate_what_one_device_does(untrained_talk, tmp_path):
    out, fsdp = untrained_talk.out, ("--mesh.fsdp", "2")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    file = tmp_path / "answers.jsonl"
    words = ("generate", out, *prompts, "--max_tokens", "8", "--output", file, *fsdp)
    assert output_of(*words, devices=1) == ""
    assert lines_of(file) == generate_answers(str(out), prompts=PROMPTS, max_tokens=8)
    near(json.loads(output_of("eval", out, *fsdp, devices=1)), evaluate_run(out))


@pytest.mark.slow
def test_two_processes_evaluate_tasks_on_a_model(first_talk, tmp_path):
    root = write_tasks(tmp_path / "tasks")
    words = ("eval", first_talk.model, "--tasks", "boolq", "--data_root", root)
    file = tmp_path / "results.json"
    output_of(*words, "--template", "completion", "--output", file, *SPLIT, devices=4)
    options = {"template": "completion", "mesh": {"data": 1}}
    alone, _ = evaluate_tasks(str(first_talk.model), ["boolq"], root, output=tmp_path / "a.json", **options)
    assert json.loads(file.read_text())["tasks"] == alone.to_json()["tasks"]


@pytest.mark.slow
def test_processes_that_differ_or_fail_end_with_one_line_each(untrained, tmp_path):
    for own, words in (
        ((("--text", "good"), ("--text", "bad")), ["processes", "texts"]),
        ((("--data", untrained.data), ("--data", untrained.data)), ["a.jsonl", "exists"]),
    ):
        more = ("--output", tmp_path / "a.jsonl") if "exists" in words else ()
        (tmp_path / "a.jsonl").touch()
        for end in run_two("predict", untrained.out, *more, devices=4, own=own):
            assert_one_error(end, *words)
