"""Names of modules, both ways."""

from loraplus_jax.interop.path_map import check_path_map, modules_of, torch_module_of

from ..refusals import refusals


def rule(*names):
    return lambda: check_path_map([names])


test_invalid_rules_are_rejected = refusals(
    (rule("a"), "(ours, theirs)", "('a',)"),
    (rule("a/{x}", "b"), "{x}", "'a/{x}'", "'b'"),
    (rule("a/{x}/{x}", "b.{x}"), "'a/{x}/{x}'"),
    (rule("a", "b", "Lineer"), "'Lineer'", "'Linear'"),
    (rule("a/{x|y}", "b.{x|y}"), "{a|b}", "'a/{x|y}'"),
    (rule("a", "b.{x|y}.{z|w}"), "{a|b}", "'b.{x|y}.{z|w}'"),
    (rule("a", "b.{x|x}"), "distinct", "'b.{x|x}'"),
    *(
        (rule("q", f"qkv{outputs}"), "[0:8 of 24]", f"qkv{outputs}")
        for outputs in ("[4:4 of 9]", "[4:10 of 9]", "[1:2]", "[a:b of c]")
    ),
    (rule("q", "qkv[0:4 of 9]", "Embedding"), "outputs", "'Embedding'"),
)


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


def test_parameters_of_one_module_are_wrapped_around_each_other():
    rules = [(f"mlp/{x}", f"h.{{layer}}.experts.{x}", "Parameter") for x in ("up", "down")]
    assert modules_of(rules, "h.1.experts") == [("mlp/down", (1,))]
    assert modules_of(rules, "h.1.experts.base_layer") == [("mlp/up", (1,))]
    assert modules_of(rules, "h.1.experts.base_layer.base_layer") == []
    assert modules_of(rules[:1], "h.1.experts") == [("mlp/up", (1,))]


def test_parts_go_both_ways():
    rules = [("{layer}/kv", "h.{layer}.{k_proj|v_proj}"), ("h/{name}", "h.{layer}.{name}")]
    module = torch_module_of(rules, "7/kv")
    assert module is not None
    assert [module.at((n,)) for n in range(2)] == ["h.7.k_proj", "h.7.v_proj"]
    assert modules_of(rules, "h.7.v_proj") == [("7/kv", (1,))]
    assert modules_of(rules, "h.7.q_proj") == [("h/q_proj", (7,))]
    assert modules_of(rules, "h.7.k_proj|v_proj") == [("h/k_proj|v_proj", (7,))]
