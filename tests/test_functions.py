"""Adapters on plain functions: any tree of weights, and all that reads specs."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax import (
    LoRAPlusConfig,
    describe,
    init_state,
    jit_step,
    load_adapter,
    lora_plus_adamw,
    merge,
    population_step,
    save_adapter,
    unmerge,
)
from loraplus_jax import apply_lora_plus as apply_to_module
from loraplus_jax.adapter.adapter_stack import apply_rows, select_adapters, stack_adapters
from loraplus_jax.adapter.lora import disabled, scale_variables
from loraplus_jax.functions import apply_lora_plus, init_lora, quantize_base, whole_weights
from loraplus_jax.interop import Adapter, load_peft, save_peft
from loraplus_jax.quantization import is_packed

from .refusals import refusals
from .zoo.linen_toys import used
from .zoo.properties import KEY, close

DRAW = np.random.default_rng(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """A layer of a tree that is no dict."""

    up: jax.Array
    down: jax.Array


def weights(size=8, wide=64):
    draw = lambda *shape: jnp.asarray(DRAW.normal(size=shape).astype("f") / np.sqrt(shape[0]))  # noqa: E731
    blocks = [Block(draw(size, wide), draw(wide, size)) for _ in range(2)]
    return {"blocks": blocks, "head": (draw(size, 1), jnp.zeros(1)), "act": jnp.tanh}


def model(params, x, scale=1.0):
    for block in params["blocks"]:
        x = x + params["act"](x @ block.up) @ block.down
    return scale * (x @ params["head"][0])


PARAMS, X = weights(), jnp.asarray(DRAW.normal(size=(6, 8)).astype("f"))
RULES = {"blocks/./(up|down)": "io"}
CONFIG = LoRAPlusConfig(target_parameters=RULES, rank=2, rank_pattern={"blocks/1/up": 4}, lr_ratio=4.0)
PATHS = ["blocks/0/up", "blocks/0/down", "blocks/1/up", "blocks/1/down"]


def drawn(lora):
    return jax.tree.map(lambda x: jnp.asarray(DRAW.normal(size=x.shape).astype("f") / 4), lora)


@pytest.fixture(scope="module")
def adapter():
    lora, specs = init_lora(KEY, PARAMS, CONFIG)
    return lora, drawn(lora), specs


def test_a_tree_of_lists_and_dataclasses_is_adapted_merged_and_restored(adapter):
    start, lora, specs = adapter
    assert list(specs) == PATHS
    assert lora["blocks"]["1"]["up"]["lora_a"].shape == (8, 4)
    g = apply_lora_plus(model, CONFIG)
    close(g(PARAMS, start, X, scale=2.0), model(PARAMS, X, 2.0), 1e-6)
    merged = merge({"params": PARAMS}, lora, specs)["params"]
    assert isinstance(merged["blocks"][1], Block)
    assert merged["head"] is PARAMS["head"] or merged["head"][0] is PARAMS["head"][0]
    for tree in (lora, {"lora": lora}, {"lora": lora, "lora_scale": scale_variables(specs)}):
        close(g(PARAMS, tree, X), model(merged, X), 1e-5)
    close(g(PARAMS, disabled(lora), X), model(PARAMS, X), 1e-6)
    back = unmerge({"params": merged}, {"params": PARAMS}, specs)["params"]
    jax.tree.map(np.testing.assert_array_equal, back["blocks"], PARAMS["blocks"])


def test_factors_are_those_of_a_linen_model_with_the_same_parameter():
    toy = used((4, 5), jnp.matmul, "io", np.ones((3, 4), np.float32))
    config = toy.config()
    f = lambda params, x: x @ params["w"]  # noqa: E731
    params = toy.make.init(KEY, *toy.args)["params"]
    lora, specs = init_lora(KEY, params, config)
    lora = drawn(lora)
    found = apply_lora_plus(f, config)(params, lora, *toy.args)
    close(found, apply_to_module(toy.make, config).apply({"params": params, "lora": lora}, *toy.args), 1e-6)
    assert specs["w"].kind == "parameter"


def test_it_trains_and_the_ratio_of_rates_is_lambda(adapter):
    lora, _, specs = adapter
    g = apply_lora_plus(model, CONFIG)
    tx = lora_plus_adamw(1e-2, lr_ratio=CONFIG.lr_ratio, specs=specs)
    table = describe({"lora": lora}, tx, specs, frozen=PARAMS["blocks"])
    rates = {row.role: row.rate for row in table.rows}
    assert rates["b"] == pytest.approx(4 * rates["a"])
    y = jnp.sin(X.sum(1, keepdims=True))

    def loss(variables, batch, rng):
        return ((jnp.mean((g(PARAMS, variables, batch) - y) ** 2), 1.0), {})

    step = jit_step(loss, tx)
    state, losses = init_state({"lora": lora}, tx, KEY), []
    for _ in range(30):
        state, metrics = step(state, {}, X)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]

    # A population of two trains each member as alone.
    states = jax.tree.map(lambda x: jnp.stack([x, x]), init_state({"lora": lora}, tx, KEY))
    many = population_step(loss, lambda own: lora_plus_adamw(own, lr_ratio=CONFIG.lr_ratio, specs=specs))
    _, metrics = many(states, jnp.array([1e-2, 1e-3]), {}, jnp.stack([X, X]))
    assert metrics["loss"].tolist() == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_adapters_are_saved_loaded_and_exchanged_with_peft(adapter, tmp_path):
    _, lora, specs = adapter
    save_adapter(tmp_path / "ours", lora, specs, CONFIG)
    again = load_adapter(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again.lora, jax.tree.map(np.asarray, lora))
    assert (again.specs, again.config) == (specs, CONFIG)
    names = [("blocks/{layer}/{name}", "layers.{layer}.{name}", "Linear")]
    save_peft(tmp_path / "peft", lora, specs, CONFIG, names)
    theirs = load_peft(tmp_path / "peft", specs, names)
    jax.tree.map(np.testing.assert_array_equal, theirs.lora, again.lora)
    file = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        file["base_model.model.layers.1.up.lora_A.weight"], lora["blocks"]["1"]["up"]["lora_a"].T
    )


def test_rows_of_a_batch_have_adapters_of_their_own(adapter):
    _, lora, specs = adapter
    other = jax.tree.map(jnp.negative, lora)
    stack = stack_adapters([Adapter(tree, specs, CONFIG, {}) for tree in (lora, other)], slots=3)
    g = apply_lora_plus(model, stack.config)
    rows = select_adapters(stack, jnp.array([0, 1, 2, 1, 0, 2]))
    found = apply_rows(lambda v, x: g(v["params"], v, x), {"params": PARAMS}, rows, X)
    own = apply_lora_plus(model, CONFIG)
    expected = [own(PARAMS, tree, X) for tree in (lora, other, disabled(lora))]
    close(found, jnp.stack([expected[n][row] for row, n in enumerate(rows.index.tolist())]), 1e-5)


def test_packed_weights_are_their_values(adapter):
    _, lora, _ = adapter
    packed = quantize_base({"params": PARAMS}, "nf4", {"blocks/./down": "io"})["params"]
    values = jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, packed, is_leaf=is_packed)
    g = apply_lora_plus(model, CONFIG)
    grads = [jax.grad(lambda lora, p=p: jnp.sum(g(p, lora, X) ** 2))(lora) for p in (packed, values)]
    jax.tree.map(functools.partial(close, tolerance=1e-5), *grads)


def test_what_needs_a_whole_weight_is_said():
    f = lambda params, x: x @ jnp.abs(params["w"])  # noqa: E731
    params = {"w": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
    with pytest.warns(UserWarning, match="w \\(16, 16\\): abs needs the whole weight"):
        lora, specs = init_lora(KEY, params, {"w": "io"}, check=(f, np.ones((2, 16), "f")))
    merged = whole_weights(f, {"w": "io"}, params, np.ones((2, 16), "f"))
    tx = lora_plus_adamw(1e-3, lr_ratio=4.0, specs=specs)
    assert "merged for abs" in str(describe({"lora": lora}, tx, specs, merged=merged))
    with warnings.catch_warnings(action="error"):
        init_lora(KEY, PARAMS, CONFIG, check=(model, X))


def test_variant_dora_starts_as_the_base():
    config = dataclasses.replace(CONFIG, variant="dora")
    lora, _ = init_lora(KEY, PARAMS, config)
    close(apply_lora_plus(model, config)(PARAMS, lora, X), model(PARAMS, X), 1e-5)


SHAPES = {"target_parameters": {"w": "io"}, "rank": 2}


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_weights_of_8_bits_are_used_as_they_merge(variant):
    params = {"w": jnp.asarray(DRAW.normal(size=(8, 4)).astype("f")).astype(jnp.float8_e4m3fn)}
    config = LoRAPlusConfig(target_parameters={"w": "io"}, rank=2, variant=variant)
    lora, specs = init_lora(KEY, params, config)
    lora = drawn(lora)
    merged = merge({"params": params}, lora, specs)["params"]
    found = apply_lora_plus(lambda p: p["w"], config)(params, lora)
    assert found.dtype == params["w"].dtype
    np.testing.assert_array_equal(found.astype("f"), merged["w"].astype("f"))
    assert not np.array_equal(found.astype("f"), params["w"].astype("f"))


INTEGERS = {"w": jnp.ones((8, 4), jnp.int8)}

test_refused = refusals(
    (lambda: init_lora(KEY, PARAMS, {"blocks/./upp": "io"}), "target_parameters", "upp", "did you mean"),
    (lambda: init_lora(KEY, INTEGERS, {"w": "io"}), "'w'", "int8", "floating", "quantize_base"),
    (
        lambda: apply_lora_plus(lambda p, x: x @ p["w"].astype("f"), {"w": "io"})(INTEGERS, {}, X),
        *("'w'", "int8", "quantize_base"),
    ),
    (lambda: init_lora(KEY, PARAMS, {"blocks/./up": "eio"}), "needs 2 letters", "blocks/0/up", "eio"),
    (lambda: init_lora(KEY, PARAMS, LoRAPlusConfig(target_parameters=RULES, rank=9)), "rank", "9"),
    (lambda: apply_lora_plus(model, LoRAPlusConfig(target_modules=["up"])), "target_modules", "up"),
    (
        lambda: init_lora(
            KEY, jax.eval_shape(lambda: {"w": jnp.ones((4, 4))}), LoRAPlusConfig(**SHAPES, variant="dora")
        ),
        *("dora", "'w'", "shape"),
    ),
    (
        lambda: apply_lora_plus(model, dataclasses.replace(CONFIG, modules_to_save=["head"])),
        "modules_to_save",
        "head",
    ),
    (lambda: apply_lora_plus(model, CONFIG)(PARAMS, {}, X), "blocks/0/down/lora_a", "(64, 2)", "absent"),
    (lambda: apply_lora_plus(model, {"head/0": "io"})(PARAMS, init_lora(KEY, PARAMS, CONFIG)[0], X), "lora"),
)


EXPERTS = 3
MIXTURE = {"router": "io", "experts/gate_up": "eio", "experts/down": "eio"}


def mixture(dispatch, params, x):
    """A mixture of experts, each token at its best one: grouped by expert, by masks, or in a loop."""
    weights = jax.nn.softmax(x @ params["router"])
    chosen = jnp.argmax(weights, -1)
    own = params["experts"]

    def halves(y):
        gate, up = jnp.split(y, 2, -1)
        return jax.nn.silu(gate) * up

    masks = jax.nn.one_hot(chosen, EXPERTS, dtype=x.dtype)
    if dispatch == "grouped":
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=EXPERTS)
        y = halves(jax.lax.ragged_dot(x[order], own["gate_up"], sizes))
        y = jax.lax.ragged_dot(y, own["down"], sizes)[jnp.argsort(order)]
    elif dispatch == "masks":  # as maxtext's dense products do
        y = jnp.einsum("eti,eio->eto", jnp.einsum("ti,te->eti", x, masks), own["gate_up"])
        y = jnp.einsum("eto,te->to", jnp.einsum("eti,eio->eto", halves(y), own["down"]), masks)
    else:
        y = sum(
            masks[:, e : e + 1] * (halves(x @ own["gate_up"][e]) @ own["down"][e]) for e in range(EXPERTS)
        )
    return y * jnp.max(weights, -1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["grouped", "masks"])
def test_a_mixture_of_experts(dispatch):
    """Starts as the base, has the gradients of a loop over merged experts, lambda, 4 bits, and an adapter a row."""
    config = LoRAPlusConfig(target_parameters=MIXTURE, rank=2, lr_ratio=8.0)
    f = functools.partial(mixture, dispatch)
    g = apply_lora_plus(f, config)
    draw = lambda *shape: jnp.asarray(DRAW.normal(size=shape) / np.sqrt(shape[-2]))  # noqa: E731
    with jax.enable_x64(True):
        params = {
            "router": draw(64, EXPERTS),
            "experts": {"gate_up": draw(3, 64, 128), "down": draw(3, 64, 64)},
        }
        x = draw(8, 64)
        start, specs = init_lora(KEY, params, config, check=(f, x))
        close(g(params, start, x), f(params, x), 1e-12)

        lora = jax.tree.map(lambda a: jnp.asarray(DRAW.normal(size=a.shape)) / 4, start)
        merged = lambda lora: merge({"params": params}, lora, specs)["params"]  # noqa: E731
        ours = jax.grad(lambda lora, x: jnp.sum(jnp.sin(g(params, lora, x))), (0, 1))(lora, x)
        loop = jax.grad(lambda lora, x: jnp.sum(jnp.sin(mixture("loop", merged(lora), x))), (0, 1))(lora, x)
        jax.tree.map(functools.partial(close, tolerance=1e-9), ours, loop)

        tx = lora_plus_adamw(1e-3, lr_ratio=config.lr_ratio, specs=specs)
        updates, _ = tx.update(ours[0], tx.init(lora), lora)
        sizes = [float(jnp.abs(updates["experts"]["down"][f"lora_{side}"]).max()) for side in "ab"]
        assert sizes[1] == pytest.approx(8 * sizes[0], rel=1e-6)

        packed = quantize_base({"params": params}, "nf4", {"experts/.*": "io"})[
            "params"
        ]  # a stack of experts
        values = jax.tree.map(lambda w: w.dequantize() if is_packed(w) else w, packed, is_leaf=is_packed)
        close(g(packed, lora, x), g(values, lora, x), 1e-9)

        if dispatch == "masks":  # JAX has no vmap of ragged_dot over these rows
            stack = stack_adapters([Adapter(tree, specs, config, {}) for tree in (lora, start)])
            rows, h = select_adapters(stack, jnp.arange(8) % 2), apply_lora_plus(f, stack.config)
            found = apply_rows(lambda v, x: h(v["params"], v, x), {"params": params}, rows, x)
            both = [g(params, tree, x) for tree in (lora, start)]
            close(found, jnp.where((jnp.arange(8) % 2 == 0)[:, None], *both), 1e-9)
