"""Names of modules, both ways."""

import pytest

from loraplus_jax.interop.path_map import check_path_map, modules_of, torch_module_of

from ..messages import mentions


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (("a",), mentions("(ours, theirs)", "('a',)")),
        (("a/{x}", "b"), mentions("{x}", "'a/{x}'", "'b'")),
        (("a/{x}/{x}", "b.{x}"), mentions("'a/{x}/{x}'")),
        (("a", "b", "Lineer"), mentions("'Lineer'", "'Linear'")),
        (("a/{x|y}", "b.{x|y}"), mentions("{a|b}", "'a/{x|y}'")),
        (("a", "b.{x|y}.{z|w}"), mentions("{a|b}", "'b.{x|y}.{z|w}'")),
        (("a", "b.{x|x}"), mentions("distinct", "'b.{x|x}'")),
    ],
)
def test_invalid_rules_are_rejected(rule, text):
    with pytest.raises((ValueError, TypeError), match=text):
        check_path_map([rule])


def test_names_go_both_ways():
    rules = [("enc/{block}/{name}", "e.{block}.{layer}.{name}"), ("out", "out")]
    place = torch_module_of(rules, "enc/up/fc")
    assert place is not None
    assert place.at((7,)) == "e.up.7.fc"
    assert modules_of(rules, "e.up.7.fc") == [("enc/up/fc", (7,))]
    assert modules_of(rules, "e.up.x.fc") == []
    assert modules_of(rules, "e.up.07.fc") == []
    assert torch_module_of(rules, "enc/up") is None
    assert modules_of(rules, "outer") == []


def test_parts_go_both_ways():
    rules = [("{layer}/kv", "h.{layer}.{k_proj|v_proj}"), ("h/{name}", "h.{layer}.{name}")]
    module = torch_module_of(rules, "7/kv")
    assert module is not None
    assert [module.at((n,)) for n in range(2)] == ["h.7.k_proj", "h.7.v_proj"]
    assert modules_of(rules, "h.7.v_proj") == [("7/kv", (1,))]
    assert modules_of(rules, "h.7.q_proj") == [("h/q_proj", (7,))]
    assert modules_of(rules, "h.7.k_proj|v_proj") == [("h/k_proj|v_proj", (7,))]
