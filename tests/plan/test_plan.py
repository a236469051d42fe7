"""Plans on the CPU: costs against programs of all layers, sizes against shapes, and what is said."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from loraplus_jax import LoRAPlusConfig, make_mesh
from loraplus_jax.cli import main
from loraplus_jax.plan.plan import Plan, count_work, head_bytes, make_plan, with_layers
from loraplus_jax.plan.programs import evaluation_bytes, plan_step, sizes, theory_bytes
from loraplus_jax.plan.text import advice, text_of
from loraplus_jax.plan.tpu import CHIPS, shapes, tpu_devices
from loraplus_jax.settings.schema import DataSettings, ModelSettings, Settings, TrainSettings
from loraplus_jax.tasks.interface import rows_of
from loraplus_jax.training.setup import task_module

RANK = 3
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 128,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}


def settings_of(
    directory, config, *, task, model=(), train=(), targets=("q_proj", "v_proj"), layers=None, **others
):
    (directory / "config.json").write_text(json.dumps(config))
    return Settings(
        model=ModelSettings(path=str(directory), **dict(model)),
        data=DataSettings(path="no such file.csv", max_length=32),
        lora=LoRAPlusConfig(target_modules=targets, rank=RANK, layers_to_transform=layers),
        train=TrainSettings(**{"batch_size": 8, "eval_batch_size": 8, **dict(train)}),
        task=task,
        output_dir="never written",
        **others,
    )


def llama(directory, **kwargs):
    return settings_of(directory, LLAMA, task="instruction", **kwargs)


def parts_of(settings, directory):
    family = task_module(settings)
    data = family.without_data(settings)
    return family.make_base(settings, directory, data.task), data


def cost(settings, base, data, mesh):
    return plan_step(settings, base, data, mesh).lowered.compile().cost_analysis()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "devices"), [("llama", 2), ("bert", 1)])
def test_costs_of_all_layers_follow_from_those_of_one_and_two(tmp_path, kind, devices):
    if kind == "llama":
        settings = llama(tmp_path, model={"remat": "full"})
    else:  # on one device: on a mesh XLA's CPU compiler repeats the embedding's lookup in more and more places
        settings = settings_of(tmp_path, BERT, task="classification", targets=("query", "value"))
    mesh, (base, data) = make_mesh(devices), parts_of(settings, tmp_path)
    whole = cost(settings, with_layers(base, base.model.config.num_hidden_layers), data, mesh)
    work = count_work(settings, base, data, mesh)
    assert work.flops == pytest.approx(whole["flops"], rel=0.01)
    assert work.bytes == pytest.approx(whole["bytes accessed"], rel=0.02)
    assert cost(settings, base, data, mesh)["flops"] < 0.7 * whole["flops"]  # a loop's body counts once


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(3, 4), (0,)], ids=str)
def test_costs_where_some_layers_are_adapted(tmp_path, layers):
    settings, mesh = llama(tmp_path, layers=layers, targets="all-linear"), make_mesh(1)  # and the head is not
    base, data = parts_of(settings, tmp_path)
    whole = cost(settings, with_layers(base, 5), data, mesh)
    work = count_work(settings, base, data, mesh)
    assert work.flops == pytest.approx(whole["flops"], rel=0.01)
    assert work.bytes == pytest.approx(whole["bytes accessed"], rel=0.02)


def test_a_layer_to_adapt_that_is_not_there(tmp_path, capsys):
    assert main(["plan", config(tmp_path), "--lora.layers_to_transform=[3,5]"]) == 2
    assert "there is no layer 5 to adapt; there are [0, 1, 2, 3, 4]" in capsys.readouterr().err


@pytest.mark.slow
def test_micro_batches_and_pieces_of_the_loss_are_counted(tmp_path):
    mesh = make_mesh(1)
    plain = llama(tmp_path)
    base, data = parts_of(plain, tmp_path)
    one = count_work(plain, base, data, mesh)
    cut = llama(tmp_path, train={"accumulate": 4}, model={"loss_chunk": 16})
    four = count_work(cut, base, data, mesh)
    assert four.flops == pytest.approx(one.flops, rel=0.02)
    assert four.bytes > one.bytes  # weights are read four times


def test_the_head_is_read_twice_for_each_further_piece_of_the_loss(tmp_path):
    settings = llama(tmp_path, model={"loss_chunk": 64, "dtype": "bfloat16"})  # 8 rows of 8 tokens: 4 pieces
    base, data = parts_of(settings, tmp_path)
    step = plan_step(settings, base, data, make_mesh(1))
    assert head_bytes(settings, step.parts, make_mesh(1)) == 3 * 2 * 256 * 32 * 2
    assert head_bytes(settings, step.parts, make_mesh(1, 1, 2)) == 3 * 2 * 256 * 32


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    settings = llama(tmp_path_factory.mktemp("model"), train={"eval_batch_size": 8})
    return make_plan(settings), settings


def test_bytes_of_what_is_held_are_those_of_the_program(planned):
    plan, _ = planned
    held = {name: size for name, size in plan.memory.items() if name != "temporaries"}
    layer = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 64 + 2 * 32
    assert held["frozen weights"] == 4 * (5 * layer + 2 * 256 * 32 + 32)
    adapters = 5 * RANK * ((32 + 32) + (32 + 16))
    assert held["trained"] == 4 * adapters
    assert plan.trained == adapters
    assert held["batch"] == 8 * (3 * 32 + 1) * 4 // plan.devices
    # Beside them the program takes the step, the key and the optimizer's counters, and has its own code.
    assert 0 <= plan.needed - sum(plan.memory.values()) < 4096
    assert plan.fits
    assert (plan.devices, plan.layers, plan.mesh["data"]) == (jax.device_count(), 5, jax.device_count())


def test_the_gradients_of_the_adapters_are_all_that_is_exchanged(planned):
    plan, _ = planned
    assert {c.kind for c in plan.collectives} == {"all-reduce"}
    total = sum(c.times * c.bytes for c in plan.collectives)
    assert 4 * plan.trained <= total <= 4 * plan.trained + 64  # and the sums of loss and weight


def test_what_is_said(planned):
    plan, settings = planned
    text = text_of(plan, settings)
    assert f"5 layers, {plan.trained:,} of {plan.total:,} parameters trained" in text
    assert plan.total == plan.trained + plan.memory["frozen weights"] // 4
    assert "a step: 8 x 32 tokens, 1 x 32 at once on a device" in text
    assert "fits: " in text
    assert "all-reduce" in text


def fake(plan, **changes):
    return dataclasses.replace(plan, **changes)


@pytest.mark.parametrize("task", ["classification", "regression", "instruction"])
def test_columns_without_data_are_those_of_data(tmp_path, task):
    settings = (
        llama(tmp_path)
        if task == "instruction"
        else settings_of(tmp_path, BERT, task=task, targets=("query",))
    )
    data = task_module(settings).without_data(settings)
    assert rows_of(data.splits["train"]) == 1
    assert data.task.kind == task


def config(directory, **changes):
    (directory / "config.json").write_text(json.dumps(LLAMA))
    path = directory / "run.yaml"
    lines = {"model": {"path": str(directory)}, "data": {"path": "none.jsonl", "max_length": 32}}
    lines |= {"task": "instruction", "output_dir": "out", "train": {"batch_size": 8, "eval_batch_size": 8}}
    path.write_text(json.dumps(lines | changes))  # JSON is YAML
    return str(path)


def test_an_encoder_takes_no_longer_rows_than_it_has_positions(tmp_path):
    settings = settings_of(tmp_path, BERT, task="classification", targets=("query",))
    long = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_length=65))
    with pytest.raises(ValueError, match=r"data\.max_length is 65, the model takes 64 tokens at most"):
        make_plan(long)


def test_evaluation_is_compiled_and_has_to_fit(planned):
    plan, settings = planned
    base, data = parts_of(settings, Path(settings.model.path))
    mesh = make_mesh()
    step = plan_step(settings, base, data, mesh)
    many = dataclasses.replace(settings.train, eval_batch_size=8 * 4096)
    large, problem = evaluation_bytes(dataclasses.replace(settings, train=many), data, step, mesh)
    assert problem is None
    held = sum(plan.memory[name] for name in ("frozen weights", "trained", "optimizer"))
    assert held < plan.evaluation < 1e7
    assert large > plan.evaluation + 4095 * 3 * 32 * 4  # the batch alone
    tight = fake(plan, evaluation=large, room=2 * plan.needed)
    assert not tight.fits
    assert f"does not fit: {(large - 2 * plan.needed) / 1e6:.2f} MB too much" in text_of(tight, settings)
    (only,) = advice(tight, dataclasses.replace(settings, train=many))
    assert only.startswith("train.eval_batch_size below 32,768, a multiple of 8: evaluation needs")
    assert len(advice(fake(tight, room=plan.needed - 1), dataclasses.replace(settings, train=many))) > 1


def test_measuring_the_theory_has_to_fit(planned):
    plan, settings = planned
    base, data = parts_of(settings, Path(settings.model.path))
    mesh = make_mesh()
    step = plan_step(settings, base, data, mesh)
    assert plan.theory is None
    assert theory_bytes(settings, data, step, mesh) == (None, None)
    often = dataclasses.replace(settings, train=dataclasses.replace(settings.train, theory_every=10))
    needed, problem = theory_bytes(often, data, step, mesh)
    assert problem is None
    assert needed > sum(plan.memory[name] for name in ("frozen weights", "trained", "optimizer"))
    tight = fake(plan, theory=10 * plan.needed, room=2 * plan.needed)
    assert not tight.fits
    assert "theory, in its turn" in text_of(tight, often)
    (only,) = advice(tight, often)
    assert only.startswith("train.theory_every null: measuring needs ")


@pytest.mark.parametrize(
    ("problem", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm", 20.5 * 2**30),
        ("RESOURCE_EXHAUSTED: required for HLO temporaries (8.02T) exceeds", 1000 + int(8.02 * 2**40)),
        ("RESOURCE_EXHAUSTED", 1000),
    ],
)
def test_what_the_compiler_says_that_it_wanted(problem, needed):
    assert sizes(None, problem, 1000) == (needed - 1000, needed, 0)


def test_evaluation_of_choices_is_said_not_to_be_counted(planned):
    plan, settings = planned
    choices = dataclasses.replace(settings, task="multiple_choice")
    base, data = parts_of(choices, Path(settings.model.path))
    mesh = make_mesh()
    assert evaluation_bytes(choices, data, plan_step(choices, base, data, mesh), mesh) == (None, None)
    assert "; evaluation is not counted" in text_of(fake(plan, evaluation=None), settings)


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", config(tmp_path), "--json", str(file), "--lora.rank=3"]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert f"{found['trained']:,} of {found['total']:,} parameters trained" in printed
    assert found["fits"]
    assert found["collectives"][0]["kind"] == "all-reduce"
    assert Plan.__dataclass_fields__.keys() <= found.keys()
    assert main(["plan", config(tmp_path), "--json", str(file)]) == 2
    assert "exists already; choose another --json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v5q:4x4"], "v5e:4x4, v5p:4x4x4, v6e:4x4, got 'v5q:4x4'; did you mean"),
        (["--topology", "v5p:8x8"], "a topology of v5p has the form v5p:AxBxC, got 'v5p:8x8'"),
        (["--topology=v5e:32x32"], "a pod of v5e has 256 chips, v5e:32x32 would be 1,024"),
        (["--train.batch_size", "9"], "train.batch_size"),
        (["--mesh.data=4", "--train.eval_batch_size=6"], "train.eval_batch_size is 6, which the 4"),
        (
            ["--mesh.data=3", "--train.batch_size=9"],
            "is 3 devices, and there are 8; change mesh.data to one of 1, 2, 4, 8",
        ),
        (["--mesh.data=-1", "--mesh.fsdp=3"], "mesh fsdp 3 x tensor 1 does not divide the 8 devices"),
        (["--mesh.data=1", "--mesh.tensor=8"], "num_attention_heads, 4; change mesh.tensor to one of 1, 2"),
        (["--json", "/nowhere/at/all.json"], "there is no directory /nowhere/at"),
        (["--json", "/proc/plan.json"], "--json /proc/plan.json cannot be written"),
        (["--data.max_length", "0"], "max_length"),
        (["--data.max_length=65"], "data.max_length is 65, the model takes 64 tokens at most"),
        (
            ["--optimizer.head_learning_rate=0.1"],
            "head_learning_rate is set, and nothing is trained that it is",
        ),
        (
            ["--distributed.coordinator=auto"],
            "distributed.coordinator is auto, and a plan joins no other process",
        ),
        (["--model.path", "nowhere"], "cannot find the model 'nowhere'"),
        (["--topologie", "v5e:4x4"], "there is no option --topologie"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, capsys, arguments, words):
    assert main(["plan", config(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("topology", "near"),
    [
        ("v5e:3x3", "v5e:2x4, "),
        ("v6e:2x3", "v6e:2x4, "),
        ("v5e:6x6", "v5e:4x8, "),
        ("v5e:4x2", "v5e:2x4, "),
        ("v5e:2x128", "v5e:16x16, "),
        ("v5p:2x2x3", "v5p:2x2x4, "),
        ("v5p:8x4x4", "v5p:4x4x8, "),
        ("v4:1x1x1", "v4:2x2x1, "),
    ],
)
def test_a_shape_that_cannot_be_had_names_those_near_it(topology, near):
    with pytest.raises(ValueError, match=f"there is no topology {topology}; the nearest are ") as caught:
        tpu_devices(topology)
    assert near in str(caught.value)


def test_the_shapes_of_large_slices():
    assert (16, 16, 16) in shapes(CHIPS["v4"])
    assert (8, 16, 16) in shapes(CHIPS["v5p"])
    assert len(shapes(CHIPS["v6e"])) == 8


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["--fresh"]),
        ("sweep", ["--fresh"]),
        ("inspect", []),
        ("plan", ["--topology NAME", "--json FILE"]),
    ],
)
def test_help_shows_the_options_of_its_command(capsys, command, options):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    usage = " ".join(text.partition("\n\n")[0].split())
    ours = ["--fresh", "--topology NAME", "--json FILE"]
    assert usage.startswith(f"usage: loraplus {command} CONFIG [--section.field value ...]")
    assert [option for option in ours if f"[{option}]" in usage] == options
    assert all(f"{option}: " in text for option in options)


def test_without_libtpu_the_command_that_installs_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", config(tmp_path), "--topology", "v5e:4x4"]) == 2
    assert "pip install 'loraplus_jax[tpu-plan]'" in capsys.readouterr().err
