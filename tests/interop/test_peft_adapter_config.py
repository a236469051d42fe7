"""PEFT's options: what is read, and what is rejected."""

import json

import pytest

from loraplus_jax.interop.peft_adapter_config import read_options

from ..refusals import refusals


def options_file(tmp_path, **changes):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes))
    return path


def reading(**changes):
    return lambda tmp_path: read_options(options_file(tmp_path, **changes))


test_unsupported_or_invalid_options_are_rejected = refusals(
    (reading(peft_type="LOHA"), "peft_type", "LORA", "'LOHA'"),
    (reading(use_qalora=True, lora_bias=True), "use_qalora", "lora_bias", True),
    (reading(megatron_config={"a": 1}), "megatron_config"),
    (reading(loftq_config={"loftq_bits": 4}), "loftq_config"),
    (reading(corda_config={"verbose": False}), "corda_config"),
    (reading(layer_replication=[[0, 2]]), "layer_replication"),
    (reading(init_lora_weights="pissa"), "init_lora_weights", "'pissa'"),
    (reading(init_lora_weights="olora"), "init_lora_weights", "'olora'"),
    (reading(brand_new=1), "brand_new", 1),
    (reading(r=0), "r", 1, 0),
    (reading(r=None), "r", 1, None),
    (reading(lora_alpha="8"), "lora_alpha", "'8'"),
    (reading(rank_pattern={"(": 2}), "rank_pattern", "'('"),
    (reading(rank_pattern={"q": 0}), "rank_pattern", "q", 1, 0),
    (reading(alpha_pattern=[1]), "alpha_pattern", "mapping", "[1]"),
    (reading(bias="some"), "bias", "none", "all", "lora_only", "'some'"),
    (reading(target_modules=3), "target_modules", 3),
    (reading(layers_to_transform=["0"]), "layers_to_transform", "0"),
    (reading(layers_pattern="(a+)+"), "layers_pattern", "(a+)+"),
    (reading(modules_to_save="head"), "modules_to_save", "'head'"),
    (reading(modules_to_save=["hea."]), "modules_to_save", "hea."),
    (reading(use_rslora="yes"), "use_rslora", "true", "false", "'yes'"),
    (reading(use_dora=1), "use_dora", "true", "false", 1),
    (reading(base_model_name_or_path=1), "base_model_name_or_path", 1),
)


def test_options_that_are_off_or_without_effect_are_accepted(tmp_path):
    path = options_file(
        tmp_path,
        use_dora=False,
        loftq_config={},
        eva_config=None,
        layers_pattern=None,
        inference_mode=True,
        init_lora_weights="gaussian",
        megatron_core="megatron.core",
        qalora_group_size=16,
        rank_pattern={"layers.0.*": 2, "q": 3},
    )
    options = read_options(path)
    names = ("x.layers.0.q", "y.q", "my_q")
    assert options.ranks_and_alphas(names) == {"x.layers.0.q": (2, 8), "y.q": (3, 8), "my_q": (4, 8)}
    assert options.scale(2, 8) == 4.0


def test_targets_without_factors_that_no_option_explains(tmp_path):
    names, idle = ["layers.0.attn.q", "layers.1.attn.q"], {"target_modules": ["q", "k"]}
    for options, expected in (
        (idle, ["k"]),
        (idle | {"exclude_modules": ["k"]}, []),
        ({"target_modules": "k"}, []),
    ):
        assert read_options(options_file(tmp_path, **options)).missing_targets(names) == expected


LAYERS = [f"model.layers.{n}.{m}" for n in (0, 1) for m in ("attn.q", "attn.k", "mlp.experts.3.q")]


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({"target_modules": ["q"]}, {"0.attn.q", "0.mlp.experts.3.q", "1.attn.q", "1.mlp.experts.3.q"}),
        ({"target_modules": "attn.q"}, set()),  # a regular expression for the whole name
        ({"target_modules": r".*\.1\..*\.(q|k)"}, {"1.attn.q", "1.attn.k", "1.mlp.experts.3.q"}),
        # The number of a layer, and not that of an expert; a whole name is taken in any layer.
        (
            {"target_modules": ["q", LAYERS[1]], "layers_to_transform": [1, 3]},
            {"0.attn.k", "1.attn.q", "1.mlp.experts.3.q"},
        ),
        (
            {"target_modules": ["q"], "layers_to_transform": [3], "layers_pattern": ["experts"]},
            {"0.mlp.experts.3.q", "1.mlp.experts.3.q"},
        ),
        (
            {"target_modules": ["q", "k"], "exclude_modules": ["attn.q", "experts"]},
            {"0.attn.k", "0.mlp.experts.3.q", "1.attn.k", "1.mlp.experts.3.q"},
        ),
        ({"target_modules": ["q"], "modules_to_save": ["mlp"]}, {"0.attn.q", "1.attn.q"}),
        (
            {"target_modules": ["attn.k"], "target_parameters": ["experts.3.q.weight"]},
            {"0.attn.k", "1.attn.k", "0.mlp.experts.3.q", "1.mlp.experts.3.q"},
        ),
        ({"target_modules": "ALL-linear"}, {name.removeprefix("model.layers.") for name in LAYERS}),
    ],
)
def test_which_modules_peft_adapts(options, adapted, tmp_path):
    """The rules of PEFT's `check_target_module_exists`; `tests/reference` compares with PEFT itself."""
    left_out = read_options(options_file(tmp_path, **options)).left_out(dict.fromkeys(LAYERS, False))
    assert {name.removeprefix("model.layers.") for name in LAYERS if name not in left_out} == adapted


def test_all_linear_layers_are_neither_embeddings_nor_heads(tmp_path):
    names = {"emb": True, "q": False, "lm_head": False, "score": False}
    options = read_options(options_file(tmp_path, target_modules="all-linear"))
    assert options.left_out(names).keys() == {"emb", "lm_head", "score"}
    # The other of two tied modules is adapted with the one that is selected.
    tied = options_file(tmp_path, target_modules=["model.embed_tokens"], ensure_weight_tying=True)
    names = {"model.embed_tokens": True, "lm_head": False, "q": False}
    assert read_options(tied).left_out(names) == {"q": "target_modules"}


def test_many_targets_and_many_modules_take_the_time_of_both_not_of_each_pair(tmp_path, ten_seconds):
    targets = [*(f"{n:x}" for n in range(100_000)), "q", "1.v", "whole.k"]
    options = read_options(options_file(tmp_path, target_modules=targets))
    selected = [f"layers.{n}.q" for n in range(3_000)] + ["layers.1.v", "whole.k"]
    others = ["layers.2.v", "layers.1.aq", "outer.k"]
    assert set(options.left_out(dict.fromkeys([*selected, *others], False))) == {*others}
    assert len(options.missing_targets(selected)) == 100_000
