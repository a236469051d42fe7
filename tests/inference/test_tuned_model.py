"""An error in the user's own input is found before a model's weights are read."""

from typing import Any

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.inference import predict
from loraplus_jax.inference.several_adapters import describe_adapters
from loraplus_jax.inference.tuned_model import describe
from loraplus_jax.training import setup
from loraplus_jax.training.provenance import MODEL_PARTS, PARTS

from ..integration.runs import flags
from ..messages import assert_mentions
from ..refusals import refusals
from .test_eval_tasks import write_tasks

NOWHERE: Any = None  # what may differ is checked before anything is read
test_data_that_is_not_compared_may_not_differ = refusals(
    (lambda: describe(NOWHERE, allow_different=["data"]), "--allow_different", "'data'", "base.weights"),
    (lambda: describe_adapters(NOWHERE, [], ["data"]), "--allow_different", "'data'", "base.weights"),
)


@pytest.mark.parametrize(("data", "compared"), [(None, PARTS), ("a.csv", MODEL_PARTS)])
def test_only_the_data_of_a_run_is_compared(monkeypatch, tmp_path, data, compared):
    class Asked(Exception):
        pass

    def ask(*_, compared, **__):
        raise Asked(compared)

    monkeypatch.setattr(predict, "describe_task", ask)
    with pytest.raises(Asked) as asked:
        predict.evaluate_run(tmp_path, data=data)
    assert asked.value.args == (compared,)


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("eval {world} --data {file}", "{file}:1 text"),
        ("eval {talk} --data {file}", "{file} instruction"),
        ("eval {world} --output {to}.jsonl", "--output generation"),
        ("eval {talk} --mesh.data 3", "data 3"),
        ("eval {world} --data {file} --allow_different data", "--allow_different 'data'"),
        ("predict {world} --text a --allow_different data", "--allow_different 'data'"),
        ("predict {model} --adapter a={world} --text a --allow_different data", "--allow_different 'data'"),
        ("generate {talk} --prompt a --allow_different data", "--allow_different 'data'"),
        ("export {world} --to {to} --allow_different data", "--allow_different 'data'"),
        ("eval {talk} --tasks mmlu --data_root {root} --shots 3", "astronomy_test.csv:1 context"),
        ("predict {world} --data none.csv", "none.csv"),
        ("predict {world} --text ' '", "empty"),
        ("predict {talk} --text a", "generate"),
        ("predict {model} --adapter a={world} --text a --use b", "--use 'b' a"),
        ("generate {talk} --data {file} --max_tokens 4", "{file} instruction"),
        ("generate {talk} --prompt '{long}' --max_tokens 4", "prompt --max_tokens"),
        ("generate {talk} --adapter a={talk} --prompt a --use b", "--use 'b'"),
        ("export {world} --to {to} --merged --dequantized", "--dequantized model.quantize"),
        ("convert {talk} --to peft --out {to} --path_map {file}", "--path_map {talk}"),
        ("combine {talk} {root}/none --how cat --out {to}", "none exist"),
    ],
)
def test_an_error_in_the_users_input_is_found_before_weights_are_read(
    untrained, untrained_talk, tmp_path, capsys, monkeypatch, command, told
):
    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(setup, "load_params", read)
    file = write_tasks(tmp_path) / "rows.jsonl"
    file.write_text('{"note": "good"}\n')
    places = {"world": untrained.out, "model": untrained.model, "talk": untrained_talk.out}
    places |= {"file": file, "root": tmp_path, "to": tmp_path / "to", "long": "what " * 99}
    assert main(flags(command.format(**places))) == 2
    assert_mentions(capsys.readouterr().err, *told.format(**places).split())
