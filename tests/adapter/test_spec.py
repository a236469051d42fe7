"""AdapterSpec: the factors' letters and shapes for every layout, and JSON both ways."""

import json

import pytest

from loraplus_jax.adapter.spec import AdapterSpec, specs_from_json, specs_to_json

from ..messages import mentions


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
    with pytest.raises(ValueError, match=mentions("layers_to_transform", "dora", "lora")):
        spec(shape=(4, 3, 5), stacked=(0,), layers=(1,), magnitude=True)


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "rnn"}, mentions("kind", "dense", "'rnn'")),
        ({"axes": "ii"}, "axes.*'ii'"),
        ({"shape": (4, 3, 5)}, mentions("axes", "'io'", "(4, 3, 5)")),
        ({"stacked": (0,)}, mentions("axes", "'io'", "(3, 5)")),
        ({"shape": (4, 3, 5), "stacked": ("a",)}, mentions("stacked", "(4, 3, 5)", "'a'")),
        ({"shape": (4, 3, 5), "stacked": (3,)}, r"stacked.*\(4, 3, 5\).*\b3$"),
        ({"axes": "iO"}, "axes.*'iO'"),
        ({"axes": "ioX", "shape": (2, 3, 4)}, "axes.*'ioX'"),
        ({"layers": (0,)}, mentions("layers", 0, "(0,)")),
        ({"shape": (4, 3, 5), "stacked": (0,), "layers": (4,)}, mentions("layers", 4, "(4,)")),
        ({"shape": (-4, 3)}, mentions("shape", 0, -4)),
    ],
)
def test_a_bad_spec_is_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        spec(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"ranks": 2}, "'ranks'.*'rank'"),
        (lambda v: {k: x for k, x in v.items() if k not in ("rank", "scale")}, "rank.*scale"),
        (lambda v: v | {"shape": 3}, "int"),
        (lambda v: 3, ""),
        (lambda v: v | {"kind": "rnn"}, "'rnn'"),
    ],
)
def test_a_bad_entry_is_rejected_at_its_path(change, message):
    with pytest.raises(ValueError, match=f"'layers/q'.*{message}"):
        specs_from_json({"layers/q": change(spec().to_json())})
