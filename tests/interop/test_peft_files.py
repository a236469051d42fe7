"""PEFT's files without PEFT: layouts by literals and by their product, and what is rejected."""

import dataclasses
import functools
import itertools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.adapter.lora import weight_delta
from loraplus_jax.adapter.target_rules import parameter_rule
from loraplus_jax.interop.peft_adapter_config import read_options
from loraplus_jax.interop.peft_files import load_peft, peft_config, peft_options, save_peft

from ..messages import mentions
from ..refusals import refusals
from .models import PATHS, factors, net, spec_of


def saved(tmp_path, spec, rule, lora=None, config=None, key="m"):
    config = config or LoRAPlusConfig(target_modules=["m"], rank=spec.rank, alpha=spec.scale * spec.rank)
    lora = lora or factors(spec)
    save_peft(tmp_path / "a", lora, {key: spec}, config, [rule])
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def edit_options(directory, **changes):
    """Changes PEFT's options; without our notes the directory is as PEFT wrote it."""
    (directory / "loraplus.json").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_dense_layer_by_literals(tmp_path):
    spec = spec_of("dense", "io", (2, 3), rank=1)
    lora = {"m": {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[3.0, 4.0, 5.0]])}}
    found = saved(tmp_path, spec, ("m", "net.fc"), lora)
    assert {name: x.tolist() for name, x in found.items()} == {
        "net.fc.lora_A.weight": [[1.0, 2.0]],
        "net.fc.lora_B.weight": [[3.0], [4.0], [5.0]],
    }
    options = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert options["target_modules"] == ["net.fc"]
    assert (options["r"], options["lora_alpha"], options["peft_type"]) == (1, 1.5, "LORA")


def test_a_square_window_keeps_its_two_axes(tmp_path):
    """PEFT's two convolutions, written in NumPy, and a fully trained kernel, on an image that is not square."""
    spec = spec_of("conv", "iiio", (3, 3, 2, 4))
    kernel = np.random.default_rng(1).normal(size=spec.shape).astype(np.float32)
    lora, config = factors(spec), LoRAPlusConfig(target_modules=["m"], rank=2, alpha=3.0)
    rules = [("m", "conv"), ("last", "last", "Conv")]
    extras = {"params": {"last": {"kernel": kernel}}}
    save_peft(tmp_path / "a", lora, {"m": spec}, config, rules, extras=extras)
    files = load_file(tmp_path / "a/adapter_model.safetensors")
    a, b, last = (
        np.float64(files[f"base_model.model.{n}.weight"]) for n in ("conv.lora_A", "conv.lora_B", "last")
    )
    image = np.random.default_rng(2).normal(size=(6, 5, 2))

    def torch_conv(weight):  # (out, in, window...), of an image (in, height, width), without padding
        views = np.lib.stride_tricks.sliding_window_view(image.transpose(2, 0, 1), (3, 3), axis=(1, 2))
        return np.einsum("cpqhw,ochw->pqo", views, weight)

    conv = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)
    for weight, expected in (
        (weight_delta(*lora["m"].values(), spec), 1.5 * torch_conv(a) @ b[:, :, 0, 0].T),
        (kernel, torch_conv(last)),
    ):
        found = conv.apply({"params": {"kernel": weight}}, jnp.asarray(image, jnp.float32)[None])
        np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)
    again = load_peft(tmp_path / "a", {"m": spec}, rules, params=extras["params"])
    np.testing.assert_array_equal(again.extras["params"]["last"]["kernel"], kernel)


def case(ours, rule, view, *axes, **more):
    """A spec, its rule, and for each module its weight in PyTorch as (out, in), from the whole delta of ours.

    `axes` are what the rule's braces stand for; `view` takes their numbers.
    """
    rule, slices = (rule if isinstance(rule, tuple) else (rule,)), {}
    name = re.sub(r"{[^}]*}", "{}", rule[0])
    for labels in itertools.product(*axes):
        index = [axis.index(x) if isinstance(x, str) else x for axis, x in zip(axes, labels, strict=True)]
        slices[name.format(*labels)] = functools.partial(lambda w, index: view(w, *index), index=index)
    return spec_of(*ours, **more), ("m", *rule), slices


GATES, FOUR = ("gate", "up"), range(4)
TWO_DENSE, TWO_HEADS = ("dense", "io", (2, 4, 3, 5)), lambda w, n: w[n].swapaxes(1, 2).reshape(20, 3)
CASES = {
    "dense": case(("dense", "io", (3, 5)), "t", lambda w: w.T),
    "heads_out": case(("dense_general", "ioo", (3, 2, 5)), "t", lambda w: w.reshape(3, 10).T),
    "heads_in": case(("dense_general", "iio", (2, 5, 3)), "t", lambda w: w.reshape(10, 3).T),
    "einsum": case(("einsum", "oio", (2, 3, 5)), "t", lambda w: w.transpose(0, 2, 1).reshape(10, 3)),
    "conv1d": case(("dense", "io", (3, 5)), ("t", "Conv1D"), lambda w: w.T),
    "parameter": case(("parameter", "oi", (5, 3)), ("t", "Linear"), lambda w: w),
    "stacked": case(("dense", "io", (4, 3, 5)), "h.{n}.t", lambda w, n: w[n].T, FOUR, stacked=(0,)),
    "in_the_middle": case(("dense", "io", (3, 4, 5)), "h.{n}.t", lambda w, n: w[:, n].T, FOUR, stacked=(1,)),
    "twice": case(TWO_DENSE, "h.{n}.{k}.t", lambda w, n, k: w[n, k].T, range(2), FOUR, stacked=(0, 0)),
    "some_layers": case(
        ("dense", "io", (4, 3, 5)), "h.{n}.t", lambda w, n: w[n].T, (1, 3), stacked=(0,), layers=(1, 3)
    ),
    "experts": case(("einsum", "eio", (4, 3, 5)), "experts.{e}.t", lambda w, n: w[n].T, FOUR),
    "stacked_experts": case(
        ("einsum", "eio", (2, 4, 3, 5)),
        "h.{n}.{e}.t",
        lambda w, n, e: w[n, e].T,
        range(2),
        FOUR,
        stacked=(0,),
    ),
    "parts_with_one_a": case(("einsum", "ooio", (2, 4, 3, 5)), "t.{k|v}", TWO_HEADS, "kv"),
    "parts_with_an_a_each": case(("einsum", "boio", (2, 4, 3, 5)), "t.{k|v}", TWO_HEADS, "kv"),
    "stacked_parts": case(
        ("einsum", "ooi", (2, 3, 5, 4)),
        "h.{n}.{gate|up}",
        lambda w, k, n: w[n, k],
        range(3),
        GATES,
        stacked=(1,),
    ),
    "parts_and_experts": case(
        ("einsum", "oeio", (2, 4, 3, 5)), "{gate|up}.{e}", lambda w, n, e: w[n, e].T, GATES, FOUR
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_layout_has_the_same_product_there_and_comes_back_bitwise(name, tmp_path):
    spec, rule, slices = CASES[name]
    key = "m/kernel" if spec.kind == "parameter" else "m"
    lora = factors(spec)
    if spec.layers is not None:
        lora = jax.tree.map(lambda x: x * np.isin(np.arange(4), spec.layers)[:, None, None], lora)
    given = {"m": {"kernel": lora["m"]}} if spec.kind == "parameter" else lora
    found = saved(tmp_path, spec, rule, given, key=key)
    whole = np.asarray(weight_delta(lora["m"]["lora_a"], lora["m"]["lora_b"], spec))
    assert found.keys() == {f"{n}.lora_{side}.weight" for n in slices for side in "AB"}
    for module, view in slices.items():
        product = found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(spec.scale * product, view(whole), rtol=1e-5, atol=1e-6)
    again = load_peft(tmp_path / "a", {key: spec}, [rule])
    jax.tree.map(np.testing.assert_array_equal, again.lora, given)
    options = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert options["fan_in_fan_out"] == (name == "conv1d")


def test_experts_in_one_parameter(tmp_path):
    """As PEFT's ParamWrapper takes them apart: A (experts, r, in), B (out, r, experts)."""
    spec = spec_of("einsum", "eio", (4, 3, 5))
    found = saved(tmp_path, spec, ("m", "experts.down_proj", "Parameter"))
    a, b = found["experts.lora_A.weight"].reshape(4, 2, 3), found["experts.lora_B.weight"].reshape(5, 2, 4)
    lora = factors(spec)["m"]
    whole = weight_delta(lora["lora_a"], lora["lora_b"], spec)
    np.testing.assert_allclose(spec.scale * np.einsum("ore,eri->eio", b, a), whole, rtol=1e-5, atol=1e-6)
    options = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert options["target_parameters"] == ["experts.down_proj"]
    again = load_peft(tmp_path / "a", {"m": spec}, [("m", "experts.down_proj", "Parameter")])
    jax.tree.map(np.testing.assert_array_equal, again.lora, factors(spec))
    options["target_parameters"].append("experts.up_proj")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=mentions("target_parameters", "'experts.up_proj'")):
        load_peft(tmp_path / "a", {"m": spec}, [("m", "experts.down_proj", "Parameter")])


EXPERTS = [(f"experts/{n}", f"mlp.experts.{n}", "Parameter") for n in ("gate_up_proj", "down_proj")]
EXPERTS += [("shared", "shared.w", "Parameter"), ("attn", "attn")]


def test_a_config_has_the_letters_of_parameters_from_the_caller(tmp_path):
    """PEFT's files do not have them. A table may be for the whole model, of which the adapter has some."""
    kinds = {"attn": ("dense", "io", (3, 5)), "shared/kernel": ("parameter", "eio", (4, 3, 5))}
    specs = {path: spec_of(*of, leaf=f"params/{path}") for path, of in kinds.items()}
    lora = {"attn": factors(specs["attn"])["m"], "shared": {"kernel": factors(specs["shared/kernel"])["m"]}}
    config = LoRAPlusConfig(
        target_modules=["attn"], target_parameters={"shared/kernel": "eio"}, rank=2, alpha=3.0
    )
    save_peft(tmp_path / "a", lora, specs, config, EXPERTS)
    edit_options(tmp_path / "a")
    for pattern in ("shared/kernel", "shared/k.*", "shared/?.*"):
        letters = {pattern: "eio", "router": "io"}
        found = peft_config(tmp_path / "a", EXPERTS, target_parameters=letters)
        assert found.target_modules == ("attn",)
        assert parameter_rule(found, "shared/kernel") is not None
        assert [*found.target_parameters.values()] == ["eio"]
    again = load_peft(tmp_path / "a", specs, EXPERTS)
    jax.tree.map(np.testing.assert_array_equal, again.lora, lora)
    assert again.config == config
    # It may be a layer, such as flax's Einsum.
    assert peft_config(tmp_path / "a", EXPERTS).target_modules == ("attn", "shared")
    with pytest.raises(ValueError, match=mentions("target_parameters", "'shared.*'", "'eix'")):
        peft_config(tmp_path / "a", EXPERTS, target_parameters={"shared.*": "eix"})


class Experts(nn.Module):
    """A user's own experts: two parameters in one module."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal()
        up, down = (self.param(n, init, (3, 4, 4)) for n in ("gate_up_proj", "down_proj"))
        return jnp.einsum("ebi,eio->ebo", jnp.einsum("bi,eio->ebo", x, up), down).sum(0)


class Kernel(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (2, 4, 4))
        return jnp.einsum("bi,eio->ebo", x, kernel).sum(0)


class Mixture(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Experts(name="experts")(nn.Dense(4, name="attn")(x))
        return Kernel(name="shared")(x)


@pytest.mark.slow
def test_layers_and_experts_that_peft_adapted_in_a_loop_of_ones_own(tmp_path):
    letters = {"experts/.*": "eio", "shared.*": "eio"}
    config = LoRAPlusConfig(
        target_modules=["attn"],
        target_parameters=letters,
        rank=2,
        alpha=4.0,
        rank_pattern={"down_proj": 3, "shared/kernel": 1},
        alpha_pattern={"gate_up_proj": 5.0},
    )
    x = jnp.ones((2, 4))

    def start(config):
        return init_lora(apply_lora_plus(Mixture(), config), jax.random.key(0), x)

    lora, specs = start(config)
    lora = jax.tree.map(lambda factor: factor + 0.1, lora)
    save_peft(tmp_path / "a", lora, specs, config, EXPERTS)
    edit_options(tmp_path / "a")
    theirs = peft_config(tmp_path / "a", EXPERTS, target_parameters=letters)
    assert start(theirs)[1] == specs
    adapter = load_peft(tmp_path / "a", specs, EXPERTS)
    jax.tree.map(np.testing.assert_array_equal, adapter.lora, lora)
    assert adapter.config is not None
    assert start(adapter.config)[1] == specs
    base = Mixture().init(jax.random.key(1), x)
    outputs = [
        apply_lora_plus(Mixture(), c).apply({**base, "lora": adapter.lora}, x) for c in (config, theirs)
    ]
    np.testing.assert_array_equal(*outputs)
    # Without letters it may be a layer until the model is there.
    part = peft_config(tmp_path / "a", EXPERTS, target_parameters={"shared.*": "eio"})
    with pytest.raises(ValueError, match=mentions("'experts/down_proj'", "target_parameters")):
        start(part)


def test_the_tensors_of_a_users_own_model(tmp_path):
    config, lora, specs, params = net(modules_to_save=["other_head"], use_rslora=True)
    extras = {"params": {"other_head": params["other_head"]}}
    save_peft(tmp_path / "a", lora, specs, config, PATHS, extras=extras, note={"kept": 1})
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    names = ["emb.lora_embedding_A", "emb.lora_embedding_B", "out.1.weight", "out.1.bias"]
    names += [f"out.0.lora_{side}.weight" for side in "AB"]
    names += [f"layers.{n}.fc.lora_{side}.weight" for n in range(3) for side in "AB"]
    assert found.keys() == {f"base_model.model.{name}" for name in names}
    assert found["base_model.model.emb.lora_embedding_A"].shape == (2, 10)
    assert found["base_model.model.out.1.weight"].shape == (2, 8)
    again = load_peft(tmp_path / "a", specs, PATHS, params=params)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.lora, lora)
    jax.tree.map(np.testing.assert_array_equal, again.extras, extras)
    assert json.loads((tmp_path / "a/loraplus.json").read_text())["note"] == {"kept": 1}
    with pytest.raises(ValueError, match="params"):
        load_peft(tmp_path / "a", specs, PATHS)
    # What PEFT's own options say, without our notes.
    (tmp_path / "a/loraplus.json").unlink()
    bare = peft_config(tmp_path / "a", PATHS, layers=3)
    assert bare.target_modules == ("blocks/fc", "embed", "head")
    assert (bare.rank, bare.alpha, bare.use_rslora) == (2, 16.0, True)
    assert (bare.modules_to_save, bare.layers_to_transform) == (("other_head",), None)
    assert load_peft(tmp_path / "a", specs, PATHS, params=params).config == bare


def test_experts_in_one_parameter_are_pruned_together(tmp_path):
    spec, rule = spec_of("einsum", "eio", (4, 3, 5), rank=3), ("m", "experts.down_proj", "Parameter")
    lora = factors(spec)
    lora["m"]["lora_b"] = lora["m"]["lora_b"].at[:, 1].set(0).at[0].set(0)
    config = LoRAPlusConfig(target_modules=["m"], rank=3, alpha=4.5)
    save_peft(tmp_path / "a", lora, {"m": spec}, config, [rule], prune=True)
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    a, b = (found[f"base_model.model.experts.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((2 * 4, 3), (5, 2 * 4))
    again = load_peft(tmp_path / "a", {"m": spec}, [rule]).lora["m"]
    for name, axis in (("lora_a", 2), ("lora_b", 1)):
        kept = np.take(np.asarray(lora["m"][name]), [0, 2], axis)
        np.testing.assert_array_equal(np.take(np.asarray(again[name]), [0, 1], axis), kept)
        assert not np.any(np.take(np.asarray(again[name]), 2, axis))


@pytest.mark.parametrize("name", CASES)
def test_every_layout_can_be_pruned_and_comes_back_with_zeros(name, tmp_path):
    """Of three components the slices of the first index lose the second, and all slices lose the third."""
    spec, rule, slices = CASES[name]
    spec = dataclasses.replace(spec, rank=3, scale=0.7)
    lora = factors(spec)
    letters_a, letters_b = spec.factor_letters
    axis, batch = (
        letters_b.index("r"),
        next((n for n, c in enumerate(letters_b) if c in letters_a and c != "r"), None),
    )
    b = np.moveaxis(np.array(lora["m"]["lora_b"]), axis, 0)
    b[2] = 0
    if batch is not None:
        b[1].swapaxes(0, batch - (batch > axis))[0] = 0
    b = np.moveaxis(b, 0, axis)
    lora["m"]["lora_b"] = jnp.asarray(b)
    if spec.layers is not None:
        lora = jax.tree.map(lambda x: x * np.isin(np.arange(4), spec.layers)[:, None, None], lora)
    key = "m/kernel" if spec.kind == "parameter" else "m"
    given = {"m": {"kernel": lora["m"]}} if spec.kind == "parameter" else lora
    config = LoRAPlusConfig(target_modules=["m"], rank=3, alpha=0.7 * 3)
    spec = dataclasses.replace(spec, scale=config.scale)
    save_peft(tmp_path / "a", given, {key: spec}, config, [rule], prune=True)
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    options = read_options(tmp_path / "a/adapter_config.json")
    whole = np.asarray(weight_delta(lora["m"]["lora_a"], lora["m"]["lora_b"], spec))
    by_name, ranks = options.ranks_and_alphas([*slices]), set()
    for module, view in slices.items():
        rank, alpha = by_name[module]
        a, b = (found[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        ranks.add(rank)
        np.testing.assert_allclose(alpha / rank * b @ a, view(whole), rtol=1e-5, atol=1e-6)
    assert ranks == ({1, 2} if batch is not None and spec.layers is None else {2})
    again = load_peft(tmp_path / "a", {key: spec}, [rule]).lora
    pair = again["m"]["kernel"] if spec.kind == "parameter" else again["m"]
    np.testing.assert_allclose(weight_delta(*pair.values(), spec), whole, rtol=1e-5, atol=1e-6)
    # Without our notes it may be another adapter, of a lower rank than the model's.
    (tmp_path / "a/loraplus.json").unlink()
    with pytest.raises(ValueError, match="rank"):
        load_peft(tmp_path / "a", {key: spec}, [rule])


@pytest.mark.parametrize(
    ("server", "fields", "words"),
    [
        ("vllm", {}, ()),
        ("sglang", {}, ()),
        ("vllm", {"use_rslora": True}, ()),
        ("sglang", {"use_rslora": True}, ("use_rslora",)),
        ("vllm", {"alpha_pattern": {"m": 8.0}}, ("alpha_pattern", "8")),
        ("vllm", {"rank": 600}, ("rank 600", 512)),
        ("sglang", {"rank": 600}, ()),
        ("triton", {}, ("check_for", "'triton'", "vllm", "sglang")),
    ],
)
def test_what_a_server_would_ignore_is_named_before_anything_is_written(tmp_path, server, fields, words):
    config = LoRAPlusConfig(**{"target_modules": ["m", "n"], "rank": 2} | fields)
    specs = {
        n: spec_of("dense", "io", (700, 700), config.rank_of(n), f"params/{n}/kernel", config.scale_of(n))
        for n in ("m", "n")
    }
    lora, paths = {n: factors(spec)["m"] for n, spec in specs.items()}, [("m", "t"), ("n", "u")]
    save = lambda: save_peft(tmp_path / "a", lora, specs, config, paths, check_for=server)  # noqa: E731
    if not words:
        save()
        assert (tmp_path / "a/adapter_config.json").exists()
        return
    with pytest.raises(ValueError, match=mentions(*words)):
        save()
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_some_layers_of_a_stack_come_back(tmp_path):
    config, lora, specs, _ = net(target_modules=["fc"], layers_to_transform=[0, 2])
    lora = jax.tree.map(lambda x: x.at[1].set(0).astype(jnp.bfloat16), lora)
    save_peft(tmp_path / "a", lora, specs, config, PATHS)
    (tmp_path / "a/loraplus.json").unlink()
    assert peft_config(tmp_path / "a", PATHS, layers=3).layers_to_transform == (0, 2)
    # PEFT's bias "all" is of all layers.
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    names = ("layers.0.fc.base_layer", "layers.1.fc", "layers.2.fc.base_layer")
    biases = {f"base_model.model.{name}.bias": np.zeros(8, np.float32) for name in names}
    save_file(tensors | biases, file)
    assert peft_config(tmp_path / "a", PATHS, layers=3).layers_to_transform == (0, 2)
    save_file(tensors, file)
    again = load_peft(tmp_path / "a", specs, PATHS).lora
    jax.tree.map(np.testing.assert_array_equal, again, lora)
    assert {x.dtype.name for x in jax.tree.leaves(again)} == {"bfloat16"}


def test_patterns_that_would_match_another_module_are_made_exact(tmp_path):
    """PEFT's patterns match the ends of names: `fc` alone would mean `block.fc` too."""
    specs = {
        "fc": spec_of("dense", "io", (3, 5), rank=1, scale=2.0),
        "b/fc": spec_of("dense", "io", (3, 5), rank=2, scale=1.0, leaf="params/b/fc/kernel"),
    }
    config = LoRAPlusConfig(target_modules=["fc"], rank=2, alpha=2.0, rank_pattern={"b/fc": 2, "fc": 1})
    lora = {"fc": factors(specs["fc"])["m"], "b": {"fc": factors(specs["b/fc"])["m"]}}
    save_peft(tmp_path / "a", lora, specs, config, [("fc", "fc"), ("b/fc", "block.fc")])
    options = read_options(tmp_path / "a/adapter_config.json")
    assert options.ranks_and_alphas(["fc", "block.fc"]) == {"fc": (1, 2), "block.fc": (2, 2)}


@pytest.mark.slow
def test_changed_tensors_of_an_export_are_rejected(tmp_path):
    config, lora, specs, params = net(target_modules=["fc"], bias="lora_only")
    own = {"params": {"head": {"bias": jnp.ones(2)}}}
    save_peft(tmp_path / "a", lora, specs, config, PATHS, own=own)
    for name in ("adapter_model.safetensors", "loraplus.safetensors"):
        path = tmp_path / "a" / name
        saved = path.read_bytes()
        path.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
        with pytest.raises(ValueError, match=mentions(name, "changed", "digest", "loraplus.json")):
            load_peft(tmp_path / "a", specs, PATHS, params=params)
        path.write_bytes(saved)
    path.unlink()
    with pytest.raises(ValueError, match=mentions("loraplus.safetensors", "missing")):
        load_peft(tmp_path / "a", specs, PATHS, params=params)


STACKED = spec_of("dense", "io", (4, 3, 5), stacked=(0,))
EINSUMS = {
    axes: spec_of("einsum", axes, (2, 3, 4, 5)[: len(axes)]) for axes in ("eiio", "ooi", "oii", "iio", "bio")
}


def test_parts_with_one_a_need_equal_copies_of_it(tmp_path):
    spec, rule = spec_of("einsum", "ooio", (2, 4, 3, 5)), ("m", "t.{k|v}")
    tensors = {f"base_model.model.{name}": x for name, x in saved(tmp_path, spec, rule).items()}
    tensors["base_model.model.t.v.lora_A.weight"] = tensors["base_model.model.t.v.lora_A.weight"] + 1
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    text = mentions("t.v.lora_A.weight", "t.k.lora_A.weight", "params/m/kernel", "target_parameters")
    with pytest.raises(ValueError, match=text):
        load_peft(tmp_path / "a", {"m": spec}, [rule])
    # With a batch axis each part has its own A.
    spec = spec_of("einsum", "boio", (2, 4, 3, 5))
    (tmp_path / "a/loraplus.json").unlink()
    config = peft_config(tmp_path / "a", [rule])
    assert config.target_modules == ("m",)
    lora = load_peft(tmp_path / "a", {"m": spec}, [rule]).lora
    assert (lora["m"]["lora_a"][1] == lora["m"]["lora_a"][0] + 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"target_modules": ["fc"]}, {"target_modules": ["fc", "head"]}])
def test_a_module_that_the_options_select_must_have_factors(fields, tmp_path):
    """A layer of a stack without any, and a module whose name a regular expression selects as well."""
    config, lora, specs, params = net(**fields)
    save_peft(tmp_path / "a", lora, specs, config, PATHS)
    path, lost = tmp_path / "a/adapter_model.safetensors", "layers.1.fc" if len(specs) == 1 else "out.0"
    save_file({name: x for name, x in load_file(path).items() if lost not in name}, path)
    edit_options(tmp_path / "a", target_modules=r".*\.(fc|0)")
    config = peft_config(tmp_path / "a", PATHS, layers=3)
    specs = net(target_modules=config.target_modules, layers_to_transform=config.layers_to_transform)[2]
    with pytest.raises(ValueError, match=mentions(lost, "adapter_config.json")) as caught:
        load_peft(tmp_path / "a", specs, PATHS, params=params)
    assert lost not in str(caught.value).replace(f"- {lost}", "", 1)
    edit_options(tmp_path / "a", exclude_modules=[lost, "out.0"])
    load_peft(tmp_path / "a", specs, PATHS, params=params)


@pytest.mark.slow
def test_target_modules_are_ends_of_names_where_the_whole_model_is_known(tmp_path):
    names = ["emb", *(f"layers.{n}.{m}" for n in range(3) for m in ("fc", "proj")), "out.0", "out.1"]
    config, lora, specs, _ = net(target_modules=["fc", "head"])
    save_peft(tmp_path / "a", lora, specs, config, PATHS, modules=[f"model.{name}" for name in names])
    assert read_options(tmp_path / "a/adapter_config.json").target_modules == ["fc", "0"]
    save_peft(tmp_path / "b", lora, specs, config, PATHS, modules=[*names, "vision.fc", "x.0"])
    assert read_options(tmp_path / "b/adapter_config.json").target_modules == [
        *("0.fc", "1.fc", "2.fc", "out.0")
    ]
    config, lora, specs, _ = net(target_modules=["fc"], layers_to_transform=[0, 2])
    save_peft(tmp_path / "c", lora, specs, config, PATHS, modules=names)
    assert read_options(tmp_path / "c/adapter_config.json").target_modules == ["0.fc", "2.fc"]


@pytest.fixture
def exported(tmp_path):
    """A function that saves a user's model, changes the directory, and returns the directory and the specs."""

    def export(change=lambda directory: None, paths=PATHS, extras=None, **fields):
        config, lora, specs, _ = net(**{"target_modules": ["fc"]} | fields)
        save_peft(tmp_path / "a", lora, specs, config, paths, extras=extras)
        change(tmp_path / "a")
        return tmp_path / "a", specs

    return export


def options(**changes):
    return lambda directory: edit_options(directory, **changes)


def tensors(change):
    """Changes the tensors by their names without PEFT's prefix; without our notes they are as PEFT wrote them."""

    def edit(directory):
        (directory / "loraplus.json").unlink()
        file = directory / "adapter_model.safetensors"
        content = {n.removeprefix("base_model.model."): x for n, x in load_file(file).items()}
        save_file({f"base_model.model.{n}": x for n, x in change(content).items()}, file)

    return edit


def contradict(directory):
    """PEFT's options are not those of our notes any more."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))


def moved(content):
    """A factor under another module's name, and one of no module."""
    content["out.1.lora_A.weight"] = content.pop("out.0.lora_A.weight")
    return content | {"layers.0.strange.weight": content["emb.lora_embedding_A"]}


def without_prefix(directory):
    file = directory / "adapter_model.safetensors"
    save_file(load_file(file) | {"lost.lora_A.weight": np.zeros(2, np.float32)}, file)


def loading(*changes, params=None, **fields):
    def load(exported):
        directory, specs = exported(lambda directory: [change(directory) for change in changes], **fields)
        load_peft(directory, specs, PATHS, params=params and net()[3])

    return load


def reading(change, **fields):
    return lambda exported: peft_options(exported(change, **fields)[0])


def with_zeros(name):
    """Of layers 0 and 2, which are adapted, and of no other, weight and bias are under base_layer."""
    zeros = {name: np.zeros(8, np.float32)}
    change = tensors(lambda content: {n: x for n, x in content.items() if "layers.1." not in n} | zeros)
    return reading(change, layers_to_transform=[0, 2])


ALL = ["embed", "fc", "head"]
IGNORED = {
    "target_modules": {"target_modules": "emb|.*\\.1\\.fc"},
    "exclude_modules": {"exclude_modules": ["fc"]},
    "layers_to_transform": {"target_modules": ["fc"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "modules_to_save": {"modules_to_save": ["fc"]},
}
HEAD = {"params": {"other_head": {"bias": np.zeros(2, np.float32)}}}
test_files_that_contradict_themselves_or_the_model = refusals(
    (loading(options(target_modules=["fc", "k_proj"])), "target_modules", "'k_proj'"),
    (loading(contradict), 49.5),
    (
        loading(
            tensors(moved), options(target_modules=["emb", "fc", "0", "1"]), target_modules=ALL, params=1
        ),
        *("- out.0.lora_A.weight", "+ out.1.lora_A.weight", "+ layers.0.strange"),
    ),
    (loading(without_prefix), "lost.lora_A.weight", "base_model.model."),
    (loading(tensors(lambda t: {n: x.astype(int) for n, x in t.items()})), "float32", "float16", "bfloat16"),
    *(
        (with_zeros(f"{n}.{end}"), f"{n}.{end}", "PEFT")
        for n, end in (("layers.0.fc", "weight"), ("layers.1.fc.base_layer", "bias"))
    ),
    *((reading(options(**changes)), "layers.0.fc", name) for name, changes in IGNORED.items()),
    lines=9,
)
test_what_has_no_name_there_is_not_written = refusals(
    (
        lambda exported: exported(paths=PATHS[1:2], target_modules=ALL, extras=HEAD),
        "'embed'",
        "'head'",
        "params/other_head/bias",
    ),
    (
        lambda exported: exported(
            paths=(("head", "out"), ("other_head", "out")), target_modules=["head", "other_head"]
        ),
        "'head'",
        "'other_head'",
        "out",
    ),
    (lambda exported: [exported(), exported()], "a", "exists"),
    lines=9,
)


def test_options_for_what_a_model_lacks_are_no_error(exported):
    """PEFT accepts `bias` for a model without biases, which `split_trainable` rejects, and idle targets."""
    directory, specs = exported(options(bias="lora_only", target_modules=["fc", "k_proj"]))
    assert peft_config(directory, PATHS).bias == "none"
    load_peft(directory, specs, PATHS, params=net()[3])


def unfit(spec, *rule):
    return lambda tmp_path: saved(tmp_path, spec, ("m", *rule))


test_what_peft_cannot_hold_is_rejected = refusals(
    *(
        (unfit(spec, *rule), "params/m/kernel", *words)
        for spec, rule, words in [
            (spec_of("conv_transpose", "iio", (3, 2, 4)), ("t",), ("transposed", "PEFT")),
            (STACKED, ("t",), ("1 stacked", "t", 0)),
            (spec_of("dense", "io", (3, 5)), ("h.{n}.t",), ("0 stacked", "h.{n}.t", 1)),
            (spec_of("dense", "io", (3, 5)), ("t", "Embedding"), ("dense", "Embedding", "t", "Linear")),
            (EINSUMS["eiio"], ("t", "Parameter"), ("'eiio'",)),
            (EINSUMS["ooi"], ("{a|b|c}",), ("'ooi'", 3)),
            (EINSUMS["oii"], ("{a|b}",), ("'oii'", 2)),
            (EINSUMS["iio"], ("{a|b}",), ("'iio'", 2)),
            (EINSUMS["bio"], ("{a|b}.t", "Parameter"), ("'bio'", 2)),
            (spec_of("einsum", "beio", (2, 2, 3, 4)), ("{e}.{a|b}",), ("'beio'", "follow")),
        ]
    )
)
