"""Commands on a mesh, of one process and of two, give what one device gives."""

import json
import sys

import jax
import numpy as np
import pytest

from loraplus_jax.inference.devices import choose_mesh
from loraplus_jax.inference.eval_tasks import evaluate_tasks
from loraplus_jax.inference.generate import generate_answers
from loraplus_jax.inference.predict import evaluate_run, predict_run
from loraplus_jax.inference.tuned_model import describe, load
from loraplus_jax.settings.schema import MeshSettings
from loraplus_jax.training.place import look

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


@pytest.fixture(scope="module")
def alone(untrained_talk):
    """Answers and evaluation of a language model on one device."""
    out = str(untrained_talk.out)
    return generate_answers(out, prompts=PROMPTS, max_tokens=8), evaluate_run(untrained_talk.out)


@pytest.mark.slow
def test_a_language_model_on_a_mesh_evaluates_and_answers_as_on_one_device(untrained_talk, alone):
    answers, metrics = alone
    near(evaluate_run(untrained_talk.out, mesh=MESH), metrics)
    assert generate_answers(str(untrained_talk.out), prompts=PROMPTS, max_tokens=8, mesh=MESH) == answers
    assert len({row["answer"] for row in answers}) == len(PROMPTS)


@pytest.mark.slow
def test_an_encoder_on_a_mesh_predicts_as_on_one_device(untrained):
    rows = [predict_run(untrained.out, data=str(untrained.data), mesh=mesh) for mesh in (None, MESH)]
    assert [row["prediction"] for row in rows[0]] == [row["prediction"] for row in rows[1]]
    shares = [[list(row["probabilities"].values()) for row in part] for part in rows]
    np.testing.assert_allclose(*shares, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_device_holds_its_part_of_the_weights_alone(untrained_talk):
    def bytes_of(mesh):
        described = describe(look(untrained_talk.out))
        leaves = jax.tree.leaves(load(described, choose_mesh(described.settings.mesh, mesh)).variables)
        assert all(len(x.addressable_shards) in (1, 8) for x in leaves)
        return sum(x.addressable_shards[0].data.nbytes for x in leaves)

    whole = bytes_of(None)
    # Norms, scales of packed weights, and the narrow side of factors are whole on every device.
    assert bytes_of({"fsdp": 8}) < 0.35 * whole
    assert bytes_of(MESH) < 0.5 * whole


# Several processes

COMMANDS = """
import json, sys
from loraplus_jax.cli.commands import main
from loraplus_jax.settings.schema import DistributedSettings
from loraplus_jax.training.distributed import join_processes

number, address, commands = json.loads(sys.argv[1])
with join_processes(DistributedSettings(coordinator=address, processes=2, process_id=number)):
    for words in commands:
        assert main(words) == 0
"""


def run_two(command_of, devices):
    """How two processes end; `command_of` makes the command of one of its number and their address."""
    address = free_address()
    pair = [spawn([sys.executable, *command_of(n, address)], devices) for n in range(2)]
    with ending(pair):
        return [ended(process, 300) for process in pair]


@pytest.mark.slow
def test_two_processes_answer_and_evaluate_what_one_device_does(untrained_talk, first_talk, tmp_path, alone):
    out, root = untrained_talk.out, write_tasks(tmp_path / "tasks")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    answers, results, split = tmp_path / "answers.jsonl", tmp_path / "results.json", ("--mesh.fsdp", "2")
    tasks = ("--tasks", "boolq", "--data_root", root, "--template", "completion", "--output", results)
    commands = [
        ("generate", out, *prompts, "--max_tokens", "8", "--output", answers, *split),
        ("eval", first_talk.model, *tasks, *split),
        ("eval", out, *split),
    ]
    words = [[*map(str, command)] for command in commands]
    ends = run_two(lambda *who: ["-c", COMMANDS, json.dumps([*who, words])], devices=1)
    assert [end[0] for end in ends] == [0, 0], ends
    assert not ends[1][1].strip()  # the lines of Gloo, which are left out, may end twice
    assert lines_of(answers) == alone[0]
    near(json.loads(ends[0][1][ends[0][1].rindex("{") :]), alone[1])
    options = {"template": "completion", "mesh": {"data": 1}}
    one, _ = evaluate_tasks(str(first_talk.model), ["boolq"], root, output=tmp_path / "a.json", **options)
    assert json.loads(results.read_text())["tasks"] == one.to_json()["tasks"]


@pytest.mark.slow
def test_processes_that_differ_end_with_one_line_each(untrained):
    predict = ("-m", "loraplus_jax.cli", "predict", str(untrained.out), "--text")
    for end in run_two(lambda n, address: [*predict, "good" if n else "bad", *member(n, address)], devices=4):
        assert_one_error(end, "processes", "texts")
