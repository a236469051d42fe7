"""The command line of a plan."""

import json

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.plan import plan as module
from loraplus_jax.plan.plan import Plan

from ..messages import assert_mentions
from .tiny import config


@pytest.mark.slow
def test_a_layer_to_adapt_that_does_not_exist(tmp_path, capsys):
    assert main(["plan", config(tmp_path), "--lora.layers_to_transform=[2,5]"]) == 2
    assert_mentions(capsys.readouterr().err, "layers_to_transform", 5, "[0, 1, 2]")


@pytest.mark.slow
def test_the_command_writes_what_it_prints(planned, tmp_path, capsys, monkeypatch):
    asked, file = [], tmp_path / "plan.json"
    monkeypatch.setattr(module, "make_plan", lambda *given: asked.append(given) or planned[0])
    assert main(["plan", config(tmp_path), "--json", str(file), "--lora.rank=3"]) == 0
    ((settings, topology),) = asked
    assert (settings.lora.rank, settings.task, topology) == (3, "instruction", None)
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert f"{found['trained']:,} of {found['total']:,} parameters trained" in printed
    assert found["fits"]
    assert found["collectives"][0]["kind"] == "all-reduce"
    assert Plan.__dataclass_fields__.keys() <= found.keys()
    assert main(["plan", config(tmp_path), "--json", str(file)]) == 2
    assert_mentions(capsys.readouterr().err, file, "--json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v5q:4x4"], ["v5e:4x4", "v5p:4x4x4", "v6e:4x4", "'v5q:4x4'"]),
        (["--topology", "v5p:8x8"], ["v5p:AxBxC", "'v5p:8x8'"]),
        (["--topology=v5e:32x32"], ["v5e:32x32", 256, "1,024"]),
        (["--train.batch_size", "9"], ["train.batch_size", 9]),
        (["--mesh.data=4", "--train.eval_batch_size=6"], ["train.eval_batch_size", 6, 4]),
        (["--mesh.data=3", "--train.batch_size=9"], ["3 devices", 8, "mesh.data", "1, 2, 4, 8"]),
        (["--mesh.data=-1", "--mesh.fsdp=3"], ["fsdp 3", "8 devices", "mesh.fsdp"]),
        (["--mesh.data=1", "--mesh.tensor=8"], ["num_attention_heads", 4, "mesh.tensor", "1, 2"]),
        (["--json", "/nowhere/at/all.json"], ["/nowhere/at"]),
        (["--json", "/proc/plan.json"], ["--json", "/proc/plan.json"]),
        (["--data.max_length", "0"], ["data.max_length", 0]),
        (["--data.max_length=65"], ["data.max_length", 65, 64]),
        (["--optimizer.head_learning_rate=0.1"], ["optimizer.head_learning_rate"]),
        (["--distributed.coordinator=auto"], ["distributed.coordinator", "auto"]),
        (["--model.path", "nowhere"], ["model", "'nowhere'"]),
        (["--topologie", "v5e:4x4"], ["--topologie"]),
        (["--search", "3", "--topology=v5e:2x2"], ["'3'"]),
        (["--topology", "h10:8"], ["'h10:8'", "did you mean", "'h100'"]),
        (["--topology", "a100.yml:8"], ["a100.yml"]),
        (["--fits", "--mesh.fsdp=2"], ["--fits", "--mesh.fsdp"]),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, capsys, arguments, words):
    assert main(["plan", config(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert_mentions(error, *words)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "extra"),
    [(["--topology=v5e:4x4"], "tpu-plan"), (["--topology=h100:8"], "gpu-plan"), (["--fits"], "gpu-plan")],
)
def test_without_the_compiler_the_command_that_installs_it_is_named(
    tmp_path, capsys, monkeypatch, options, extra
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", config(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert f"pip install 'loraplus_jax[{extra}]'" in error
    assert error.count("\n") == 1
