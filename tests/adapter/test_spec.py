"""AdapterSpec: the factors' letters and shapes for every layout, and JSON both ways."""

import json

import pytest

from loraplus_jax.adapter.spec import AdapterSpec, specs_from_json, specs_to_json

from ..refusals import refusals


def spec(**fields):
    known = {
        "leaf": "params/q/kernel",
        "kind": "dense",
        "axes": "io",
        "shape": (3, 5),
        "rank": 2,
        "scale": 2.0,
    }
    return AdapterSpec(**(known | fields))


@pytest.mark.parametrize(
    ("axes", "shape", "stacked", "a", "b"),
    [
        ("io", (3, 5), (), (3, 2), (2, 5)),
        ("io", (4, 3, 5), (0,), (4, 3, 2), (4, 2, 5)),
        ("io", (3, 4, 5), (1,), (3, 4, 2), (2, 4, 5)),
        ("io", (3, 5, 4), (-1,), (3, 2, 4), (2, 5, 4)),
        ("io", (6, 4, 3, 5), (0, 0), (6, 4, 3, 2), (6, 4, 2, 5)),
        ("io", (4, 6, 3, 5), (0, 1), (4, 6, 3, 2), (4, 6, 2, 5)),
        ("io", (6, 3, 5, 4), (-1, 0), (6, 3, 2, 4), (6, 2, 5, 4)),
        ("gio", (7, 3, 5), (), (7, 3, 2), (7, 2, 5)),
        ("goi", (4, 7, 5, 3), (0,), (4, 7, 3, 2), (4, 7, 2, 5)),
    ],
)
def test_factor_shapes(axes, shape, stacked, a, b):
    assert spec(axes=axes, shape=shape, stacked=stacked).factor_shapes == (a, b)


def test_stacked_letters_are_innermost_first():
    assert spec(shape=(6, 4, 3, 5), stacked=(0, 0)).base_letters == "BAab"
    assert spec(shape=(4, 6, 3, 5), stacked=(0, 1)).base_letters == "ABab"


def test_magnitudes_have_the_axes_of_b_without_the_rank():
    one = spec(axes="eioo", shape=(2, 4, 3, 5), magnitude=True)
    assert one.factor_shapes[2] == (2, 1, 3, 5)
    assert one.factor_paths("q") == ("q/lora_a", "q/lora_b", "q/lora_magnitude")


def test_table_round_trip():
    table = {"": spec(), "layers/q": spec(shape=(4, 3, 5), stacked=(0,), rank=1, scale=0.5, magnitude=True)}
    values = specs_to_json(table)
    assert values[""] == {
        "leaf": "params/q/kernel",
        "kind": "dense",
        "axes": "io",
        "shape": [3, 5],
        "rank": 2,
        "scale": 2.0,
        "stacked": [],
        "layers": None,
        "magnitude": False,
    }
    assert specs_from_json(json.loads(json.dumps(values))) == table


STACKED = {"shape": (4, 3, 5), "stacked": (0,)}

test_a_bad_spec_is_rejected = refusals(
    (lambda: spec(kind="rnn"), "kind", "dense", "'rnn'"),
    (lambda: spec(axes="ii"), "axes", "'ii'"),
    (lambda: spec(shape=(4, 3, 5)), "axes", "'io'", "(4, 3, 5)"),
    (lambda: spec(stacked=(0,)), "axes", "'io'", "(3, 5)"),
    (lambda: spec(shape=(4, 3, 5), stacked=("a",)), "stacked", "(4, 3, 5)", "'a'"),
    (lambda: spec(shape=(4, 3, 5), stacked=(3,)), "stacked", "(4, 3, 5)", "got 3"),
    (lambda: spec(axes="iO"), "axes", "'iO'"),
    (lambda: spec(axes="ioX", shape=(2, 3, 4)), "axes", "'ioX'"),
    (lambda: spec(layers=(0,)), "layers", 0, "(0,)"),
    (lambda: spec(**STACKED, layers=(4,)), "layers", 4, "(4,)"),
    (lambda: spec(shape=(-4, 3)), "shape", 0, -4),
    (lambda: spec(**STACKED, layers=(1,), magnitude=True), "layers_to_transform", "dora", "lora"),
    error=ValueError,
)


def table_with(entry):
    return specs_from_json({"layers/q": entry})


test_a_bad_entry_is_rejected_at_its_path = refusals(
    (lambda: table_with(spec().to_json() | {"ranks": 2}), "'layers/q'", "'ranks'", "'rank'"),
    (
        lambda: table_with({"leaf": "w", "kind": "dense", "axes": "io", "shape": [3, 5]}),
        "'layers/q'",
        "rank",
        "scale",
    ),
    (lambda: table_with(spec().to_json() | {"shape": 3}), "'layers/q'", "int"),
    (lambda: table_with(3), "'layers/q'"),
    (lambda: table_with(spec().to_json() | {"kind": "rnn"}), "'layers/q'", "'rnn'"),
    error=ValueError,
)
