"""Moves of an adapted weight, and where it is used: the merged weight's values and gradients, by thin products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as P

from loraplus_jax import LoRAPlusConfig, merge
from loraplus_jax import apply_lora_plus as apply_to_module
from loraplus_jax import init_lora as init_module
from loraplus_jax import nnx as loraplus_nnx
from loraplus_jax.functions import apply_lora_plus, init_lora, quantize_base, whole_weights
from loraplus_jax.interpreter.products import product

from ..marks import slow
from ..zoo.linen_toys import used
from ..zoo.properties import KEY, close, drawn

EXPERTS, ROWS, IN, OUT = 4, 12, 8, 16
DRAW = np.random.default_rng(0)
PARAMS = {
    "experts": DRAW.normal(size=(EXPERTS, IN, OUT)),
    "up": DRAW.normal(size=(IN, OUT)),
    "gate": DRAW.normal(size=(IN, OUT)),
}
X, Y = DRAW.normal(size=(ROWS, IN)), DRAW.normal(size=(ROWS, OUT))
ROW, BEYOND = jnp.array([5, 0, 5, 7, -1]), jnp.array([1, 3, 99])
GROUPS, CHOSEN = np.array([3, 4, 3, 2], np.int32), np.arange(ROWS, dtype=np.int32) % EXPERTS


def loop(p):
    """Over experts by a traced index."""
    add = lambda e, y: y + X @ p["experts"][e]  # noqa: E731
    return jax.lax.fori_loop(0, EXPERTS, add, jnp.zeros((ROWS, OUT)))


def shards(of_x, of_w, fn, name, out=None):
    """A product on a mesh of two by two devices."""
    mesh = jax.make_mesh((2, 2), ("m", "d"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"in_specs": (P(*of_x), P(*of_w)), "out_specs": P(*out)}
    return lambda p: jax.shard_map(fn, mesh=mesh, **specs)(X, p[name])


def gathered(x, w):
    return x @ jax.lax.all_gather(w, "m", axis=0, tiled=True)


E, U, BOTH = {"experts": "eio"}, {"up": "io"}, {"up|gate": "io"}
USES = {
    "grouped rows": (lambda p: jax.lax.ragged_dot(X, p["experts"], GROUPS), E),
    "grouped rows, to the inputs": (lambda p: jax.lax.ragged_dot(Y, p["experts"].swapaxes(1, 2), GROUPS), E),
    "every expert": (lambda p: jnp.einsum("ti,eio->teo", X, p["experts"]), E),
    "one expert": (lambda p: X @ p["experts"][2], E),
    "an expert by a traced index": (loop, E),
    "an expert of each row": (lambda p: jnp.einsum("ti,tio->to", X, p["experts"][CHOSEN]), E),
    "take": (lambda p: jnp.einsum("ti,tio->to", X, jnp.take(p["experts"], CHOSEN, axis=0)), E),
    "vmap over indices": (lambda p: jax.vmap(lambda e: X @ p["experts"][e])(jnp.arange(3)), E),
    "vmap": (lambda p: jax.vmap(lambda w: X @ w)(p["experts"]), E),
    "scan": (lambda p: jax.lax.scan(lambda y, w: (y + X @ w, None), Y, p["experts"])[0], E),
    "cond": (
        lambda p: jax.lax.cond(p["up"][0, 0] > 9, *(lambda e=e: X @ p["experts"][e] for e in (0, 1))),
        E,
    ),
    "groups of experts": (
        lambda p: jnp.einsum("ti,gnio->tgno", X, p["experts"].reshape(2, 2, IN, OUT)),
        E,
    ),
    "split outputs": (lambda p: [X @ w for w in jnp.split(p["up"], [4], axis=-1)], U),
    "split inputs": (lambda p: X[:, :3] @ p["up"][:3] + jnp.sin(X[:, 3:] @ p["up"][3:]), U),
    "heads": (lambda p: jnp.einsum("ti,ihd->thd", X, p["up"].reshape(IN, 2, -1)), U),
    "parts of inputs": (
        lambda p: jnp.einsum("tab,abo->to", X.reshape(ROWS, 2, 4), p["up"].reshape(2, 4, -1)),
        U,
    ),
    "gate and up in one": (lambda p: X @ jnp.concatenate([p["gate"], p["up"]], -1), BOTH),
    "with one that has no adapter": (lambda p: X @ jnp.concatenate([p["gate"], p["up"]], -1), U),
    "inputs in one": (lambda p: jnp.tile(X, 2) @ jnp.concatenate([p["gate"], p["up"]], 0), BOTH),
    "stacked": (lambda p: jnp.einsum("ti,eio->teo", X, jnp.stack([p["gate"], p["up"]])), BOTH),
    "experts and one more": (
        lambda p: jnp.einsum("ti,eio->teo", X, jnp.concatenate([p["experts"], p["up"][None]])),
        {"experts": "eio", "up": "io"},
    ),
    "a new axis and back": (lambda p: X @ p["up"][None][0], U),
    "remat": (lambda p: jax.checkpoint(lambda w: jnp.sin(X @ w[:, :4]))(p["up"]), U),
    "shards of inputs": (shards((None, "m"), ("m",), lambda x, w: jax.lax.psum(x @ w, "m"), "up", ()), U),
    "shards of outputs": (shards(("d",), (None, "m"), jnp.matmul, "up", ("d", "m")), U),
    "shards of experts": (
        shards((), ("m",), lambda x, w: jnp.einsum("ti,eio->eto", x, w), "experts", ("m",)),
        E,
    ),
    "shards of rows": (shards(("d",), (), jnp.matmul, "up", ("d",)), U),
    "shards gathered": (shards(("m",), ("m",), gathered, "up", ("m",)), U),
    "experts in reverse": (lambda p: [X @ w for w in p["experts"][::-1]], E),
    "outputs in reverse": (lambda p: X @ p["up"][:, ::-1], U),
    "stopped": (lambda p: X @ p["up"] + X @ jax.lax.stop_gradient(p["up"]), U),
    "to the outputs and back": (lambda p: (X @ p["up"]) @ p["up"].T, U),
    "grouped whole numbers": (
        lambda p: jax.lax.ragged_dot((9 * X).astype(np.int32), p["experts"], GROUPS),
        E,
    ),
    "experts beyond the last": (
        lambda p: jnp.einsum("ti,tio->to", X, p["experts"].at[2 * CHOSEN].get(mode="fill", fill_value=2.0)),
        E,
    ),
    "nothing": (lambda p: X @ p["up"] + p["up"][:, :0].reshape(IN, 0, 4).sum(), U),
    "scaled": (lambda p: X @ (2 * p["up"]), U),
    "mixed by a reshape": (lambda p: jnp.tile(X, 2) @ p["up"].reshape(OUT, IN), U),
    "rows": (lambda p: p["up"][ROW], U),
    "rows in a vmap": (lambda p: jax.vmap(lambda i: p["up"][i])(ROW), U),
    "rows in two vmaps": (lambda p: jax.vmap(jax.vmap(lambda i: p["up"][i]))(ROW[:, None]), U),
    "rows in a map": (lambda p: jax.lax.map(lambda i: p["up"][i], jnp.arange(20) % IN), U),
    "rows in a map of batches": (lambda p: jax.lax.map(lambda i: p["up"][i], ROW, batch_size=2), U),
    "rows of a transposed table": (lambda p: p["up"].T[:, ROW], U),
    "rows of every expert": (lambda p: p["experts"][:, ROW], E),
    "rows of each expert": (lambda p: jax.vmap(lambda w, i: w[i])(p["experts"], CHOSEN.reshape(4, 3)), E),
    "a row of some experts": (lambda p: p["experts"][ROW % EXPERTS, ROW], E),
    "rows beyond the last, masked": (
        lambda p: jnp.where(BEYOND[:, None] < IN, jnp.take(p["up"], BEYOND, axis=0), 0),
        U,
    ),
    "rows beyond the last, filled": (lambda p: p["up"].at[BEYOND].get(mode="fill", fill_value=2.0), U),
    "values beyond the last, filled": (
        lambda p: p["up"].at[BEYOND, jnp.zeros_like(BEYOND)].get(mode="fill", fill_value=2.0),
        U,
    ),
    "other rows in either branch": (
        lambda p: jax.lax.cond(X[0, 0] > 9, lambda w: jnp.sin(w[:3]), lambda w: jnp.sin(w[-3:]), p["up"]),
        U,
    ),
    "a row": (lambda p: Y * p["up"][jnp.argmax(X[0])][None], U),
    "first rows": (lambda p: Y[:, None] + p["up"][None, :3], U),
    "first outputs": (lambda p: jnp.sin(p["up"][:, :3]), U),
    "windows of inputs": (
        lambda p: jax.vmap(lambda i: X[:, :2] @ jax.lax.dynamic_slice_in_dim(p["up"], i, 2))(ROW[:3]),
        U,
    ),
    "outputs by index": (lambda p: X @ p["up"][:, ROW], U),
    "outputs by index, transposed": (lambda p: X @ p["up"].T[ROW].T, U),
    "an output of each input": (lambda p: jax.vmap(lambda w, i: w[i])(p["up"], CHOSEN[:IN]), U),
    "single values": (lambda p: p["up"].at[ROW, ROW[::-1]].get(unique_indices=True, mode="clip"), U),
    "all rows, in parts": (lambda p: [jnp.sin(p["up"][:3]), jnp.sin(p["up"][3:])], U),
    "all outputs, in parts": (lambda p: [jnp.sin(w) for w in jnp.split(p["up"], 2, -1)], U),
    "all experts, in a loop": (
        lambda p: jax.lax.fori_loop(0, EXPERTS, lambda e, y: y + jnp.sin(p["experts"][e]), p["up"]),
        E,
    ),
    "shards, each as one": (shards((), ("m",), lambda x, w: jnp.sin(w), "up", ("m",)), U),
    "in 8 bits": (lambda p: X @ p["up"].astype(jnp.float8_e4m3fn).astype(X.dtype), U),
    "in 8 bits, by a product of them": (
        lambda p: jnp.matmul(X, p["up"].astype(jnp.float8_e5m2), preferred_element_type=X.dtype),
        U,
    ),
    "in 16 bits by a jitted cast, and back": (
        lambda p: X @ jax.jit(lambda w: w.astype(jnp.bfloat16).T)(p["up"]).T.astype(X.dtype),
        U,
    ),
    "in 16 bits by a checkpointed cast, and back": (
        lambda p: X @ jax.checkpoint(lambda w: w.astype(jnp.bfloat16))(p["up"]).astype(X.dtype),
        U,
    ),
    "in 16 bits and back": (lambda p: X @ p["up"].astype(jnp.bfloat16).astype(X.dtype), U),
    "in 16 bits and back in a scan": (
        lambda p: jax.lax.scan(
            lambda y, w: (y + jnp.sin(X @ jnp.squeeze(w[None], 0).astype(X.dtype)), None),
            *(Y, p["experts"].astype(jnp.float16).swapaxes(1, 2).swapaxes(1, 2)),
        )[0],
        E,
    ),
    "in 16 bits and back in a branch": (
        lambda p: jax.lax.cond(
            X[0, 0] > 9, *(lambda w, s=s: X @ w.astype(X.dtype) * s for s in (1, 2)), p["up"].astype("f")
        ),
        U,
    ),
    "whole numbers": (
        lambda p: (
            jnp.matmul((9 * X).astype(np.int8), p["up"], preferred_element_type=jnp.int32) + X @ p["gate"]
        ),
        BOTH,
    ),
    "returned": (lambda p: p["up"], U),
}
WHOLE = {"scaled": "mul", "mixed by a reshape": "reshape", "returned": "output"}
WHOLE |= {name: "sin" for name in USES if name.startswith(("all ", "shards, each"))}
WHOLE |= dict.fromkeys([name for name in USES if name.startswith("in ")], "convert_element_type")
WHOLE |= {"whole numbers": "dot_general"}
WHOLE_DORA = WHOLE | {"inputs in one": "concatenate", "rows beyond the last, filled": "gather"}
WHOLE_DORA |= {"values beyond the last, filled": "gather"}
QUICK = ("grouped rows", "one expert", "heads", "gate and up in one", "rows in a vmap")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def adapted(rules, **fields):
    config = LoRAPlusConfig(target_parameters=rules, rank=2, **fields)
    lora, specs = init_lora(KEY, PARAMS, config)
    return config, drawn(lora), specs


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in USES])
def test_values_and_gradients_are_those_of_the_merged_weight(name, variant, x64):
    f, rules = USES[name]
    config, lora, specs = adapted(rules, variant=variant)
    total = lambda y: sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(y))  # noqa: E731
    ours = lambda lora: total(apply_lora_plus(f, config)(PARAMS, lora))  # noqa: E731
    merged = lambda lora: total(f(merge({"params": PARAMS}, lora, specs)["params"]))  # noqa: E731
    found, expected = (jax.jit(jax.value_and_grad(loss))(lora) for loss in (ours, merged))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-9)
    if variant == "lora":  # of DoRA merging differentiates the norms, which are constants
        jax.tree.map(functools.partial(close, tolerance=1e-9), found[1], expected[1])
    needs = (WHOLE_DORA if variant == "dora" else WHOLE).get(name)
    users = whole_weights(f, config, PARAMS)
    assert set(users.values()) == ({needs} if needs else set())


def test_a_loop_that_may_end_early_decodes_with_parts(x64):
    def f(p):
        def step(carry):
            return carry[0] + 1, carry[1] + X @ p["experts"][carry[0]]

        return jax.lax.while_loop(lambda carry: carry[0] < EXPERTS, step, (0, jnp.zeros((ROWS, OUT))))[1]

    config, lora, specs = adapted(E)
    expected = f(merge({"params": PARAMS}, lora, specs)["params"])
    close(apply_lora_plus(f, config)(PARAMS, lora), expected, 1e-9)
    assert not whole_weights(f, config, PARAMS)


@jax.custom_vjp
def kernel(x, w):
    """A product whose parts nothing outside sees."""
    return jnp.sin(x) @ w


kernel.defvjp(
    lambda x, w: (kernel(x, w), (x, w)), lambda r, ct: (jnp.cos(r[0]) * (ct @ r[1].T), jnp.sin(r[0]).T @ ct)
)


RULED = product(kernel, lambda x, a, b: kernel(x, a) @ b)
OWN = {  # the function, and the operation that needs the whole weight
    "without a term": (lambda p, x: kernel(x, p["up"]), "custom_vjp_call"),
    "with one": (lambda p, x: RULED(x, p["up"]), None),
    "the weight transposed": (lambda p, x: RULED(x @ p["gate"], p["up"].T), "loraplus_product"),
    "in a vmap over columns": (
        lambda p, x: jax.vmap(lambda x: RULED(x[None], p["up"]), in_axes=1)(x.T),
        "custom_vjp_call",
    ),
    "in a gradient": (
        lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(RULED(x, p["up"]))))(x),
        "custom_vjp_call",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_product_of_ones_own_is_cheap_with_its_term_and_right_wherever_it_stands(name, x64):
    f, needs = OWN[name]
    config, lora, specs = adapted(U)
    g = apply_lora_plus(f, config)
    ours = lambda lora, x: jnp.sum(jnp.sin(g(PARAMS, lora, x)))  # noqa: E731
    merged = lambda lora, x: jnp.sum(jnp.sin(f(merge({"params": PARAMS}, lora, specs)["params"], x)))  # noqa: E731
    found, expected = (jax.grad(loss, (0, 1))(lora, X) for loss in (ours, merged))
    jax.tree.map(functools.partial(close, tolerance=1e-9), found, expected)
    assert float(jnp.abs(found[1]).max()) > 0
    assert whole_weights(f, config, PARAMS, X) == ({"up": needs} if needs else {})


PACKED = {
    "one expert": lambda p, x: x @ p["w"][2],
    "each": lambda p, x: [x @ w for w in p["w"]],
    "in a scan": lambda p, x: jax.lax.scan(lambda y, w: (y + x @ w, None), 0 * x @ p["w"][0], p["w"])[0],
    "of each row": lambda p, x: jnp.einsum("ti,tio->to", x[:3], p["w"][jnp.arange(3)]),
    "of each row, by take": lambda p, x: jnp.einsum(
        "ti,tio->to", x[:3], jnp.take(p["w"], jnp.arange(3), axis=0, fill_value=2.0)
    ),
    "part of the outputs, transposed": lambda p, x: x @ p["w"][1][:8, :64].T,
}


@pytest.mark.parametrize("name", [slow(name) if n else name for n, name in enumerate(PACKED)])
def test_packed_experts_are_their_values_and_no_other_is_unpacked(name):
    f, shape = PACKED[name], (4, 64, 128)
    params = {"w": jnp.asarray(DRAW.normal(size=shape).astype("f"))}
    config = LoRAPlusConfig(target_parameters={"w": "eio"}, rank=2)
    lora, specs = init_lora(KEY, params, config)
    lora = jax.tree.map(lambda a: jnp.asarray(DRAW.normal(size=a.shape).astype("f")), lora)
    packed = quantize_base({"params": params}, "nf4", specs)["params"]
    values = {"w": packed["w"].dequantize()}
    x, g = jnp.asarray(DRAW.normal(size=(4, 64)).astype("f")), apply_lora_plus(f, config)
    total = lambda lora, p: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(g(p, lora, x)))  # noqa: E731
    found, expected = (jax.jit(jax.grad(total))(lora, p) for p in (packed, values))
    jax.tree.map(functools.partial(close, tolerance=1e-3), found, expected)
    assert not whole_weights(f, config, packed, x)
    # What fills beyond the last is none of the codes: these are unpacked.
    count = arrays_like(jax.make_jaxpr(jax.grad(total))(lora, packed).jaxpr, shape)
    assert bool(count) is name.endswith("take")


class Positive(nnx.Module):
    """A weight of which no value is negative."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones((4, 7)))

    def __call__(self, x):
        return x @ jnp.abs(self.w[...])


def test_a_reversed_kernel_is_read_by_its_layer_alone():
    layer = nnx.ConvTranspose(4, 6, (3,), transpose_kernel=True, rngs=nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=".*", rank=2)
    loraplus_nnx.apply_lora_plus(layer, config, rngs=nnx.Rngs(1))
    assert loraplus_nnx.check_reads(layer, jnp.ones((2, 8, 4))) == {}


def test_linen_and_nnx_say_which_weight_an_operation_needs_whole():
    toy = used((4, 7), lambda x, w: x @ jnp.abs(w), "io")
    expected = r"w \(4, 7\): abs needs the whole weight"
    with pytest.warns(UserWarning, match=expected):
        init_module(apply_to_module(toy.make, toy.config()), KEY, *toy.args)
    with pytest.warns(UserWarning, match=expected):
        loraplus_nnx.apply_lora_plus(
            Positive(), toy.config(), rngs=nnx.Rngs(0), check=(np.ones((2, 4), "f"),)
        )


def printing(w, x):
    """Prints a weight, sends it to the host, and multiplies by it, in a loop."""

    def step(y, _):
        jax.debug.print("{}", w[0, 0])
        io_callback(SEEN.append, None, w, ordered=True)
        return y @ w, None

    return jax.lax.scan(step, x, length=2)[0]


SEEN: list[np.ndarray] = []


class Printing(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.eye(4))

    def __call__(self, x):
        return printing(self.w[...], x)


@pytest.fixture(params=["function", slow("linen"), slow("nnx")])
def printer(request):
    """A function of factors, with the weight of `Printing`, that the weight is given to the host in."""
    config = LoRAPlusConfig(target_parameters={"w": "io"}, rank=2)
    params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
    if request.param == "function":
        lora, specs = init_lora(KEY, params, config)
        g = apply_lora_plus(lambda p, x: printing(p["w"], x), config)
        return lambda lora: g(params, lora, x), lora, specs
    if request.param == "linen":
        model = apply_to_module(used((4, 4), lambda x, w: printing(w, x), "io").make, config)
        with pytest.warns(UserWarning, match="callback needs the whole weight"):
            lora, specs = init_module(model, KEY, x)
        return lambda lora: model.apply({"params": params, "lora": lora}, x), lora, specs
    model = Printing()
    specs = loraplus_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(0))
    run = loraplus_nnx.functional(model)
    return lambda lora: run({"params": params, "lora": lora}, x), loraplus_nnx.lora_tree(model), specs


def test_callbacks_are_given_the_adapted_weight(printer, capfd):
    f, lora, specs = printer
    lora = drawn(lora, dtype=jnp.float32)
    expected = merge({"params": {"w": jnp.eye(4)}}, lora, specs)["params"]["w"]
    SEEN.clear()
    jax.block_until_ready(jax.jit(f)(lora))
    jax.effects_barrier()
    assert len(SEEN) == 2
    close(SEEN, [expected] * 2, 1e-6)
    printed = [float(line) for line in capfd.readouterr().out.split()]
    assert printed == pytest.approx([float(expected[0, 0])] * 2, rel=1e-5)


SIZE, RANK, LARGE = 128, 16, {"experts": (EXPERTS, 128, 128), "up": (128, 128), "gate": (128, 128)}
COSTS = {  # the function of (params, x), its rules, and its products with a whole matrix
    "every expert": (lambda p, x: jnp.einsum("ti,eio->teo", x, p["experts"]), E, EXPERTS),
    "experts in a loop": (lambda p, x: [x @ p["experts"][e] for e in range(EXPERTS)], E, EXPERTS),
    "an expert of each row": (
        lambda p, x: jnp.einsum("ti,tio->to", x, p["experts"][jnp.arange(256) % 4]),
        E,
        1,
    ),
    "heads": (lambda p, x: jnp.einsum("ti,ihd->thd", x, p["up"].reshape(SIZE, 4, -1)), U, 1),
    "gate and up in one": (lambda p, x: x @ jnp.concatenate([p["gate"], p["up"]], -1), BOTH, 3),
    # On CPU every expert multiplies all rows, and so do A and B.
    "grouped rows": (lambda p, x: jax.lax.ragged_dot(x, p["experts"], jnp.full(4, 64)), E, EXPERTS),
}


def arrays_like(jaxpr, shape):
    """How many operations of a program, in its loops and calls too, make an array of a shape."""
    count = 0
    for eqn in jaxpr.eqns:
        count += sum(getattr(out.aval, "shape", None) == shape for out in eqn.outvars)
        for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            count += arrays_like(inner, shape) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize("name", [name if name == "grouped rows" else slow(name) for name in COSTS])
def test_a_step_costs_the_base_s_and_thin_products(name):
    f, rules, products = COSTS[name]
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in LARGE.items()}
    config = LoRAPlusConfig(target_parameters=rules, rank=RANK)
    lora, specs = init_lora(KEY, params, config)
    x = jax.ShapeDtypeStruct((256, SIZE), jnp.float32)
    total = lambda y: sum(jnp.sum(part) for part in jax.tree.leaves(y))  # noqa: E731
    g = apply_lora_plus(f, config)
    ours = jax.grad(lambda lora, x, params: total(g(params, lora, x)), (0, 1))
    base = jax.grad(lambda x, params: total(f(params, x)))
    flops = lambda fn, *args: jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]  # noqa: E731
    # Forward, the inputs' gradient and the factors'.
    thin = 3 * 2 * 256 * RANK * (SIZE + SIZE) * products
    assert flops(ours, lora, x, params) < flops(base, x, params) + 1.1 * thin
    for path in specs:
        count = arrays_like(jax.make_jaxpr(ours)(lora, x, params).jaxpr, LARGE[path])
        assert count <= arrays_like(jax.make_jaxpr(base)(x, params).jaxpr, LARGE[path])


TABLE = (4096, 128)
LOOKUPS = {  # functions of a table and of 16 numbers of rows
    "vmap": lambda w, ids: jax.vmap(lambda i: w[i])(ids),
    "two vmaps": lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids.reshape(4, 4)),
    "map": lambda w, ids: jax.lax.map(lambda i: w[i], ids),
    "map of batches": lambda w, ids: jax.lax.map(lambda i: w[i], ids, batch_size=4),
    "transposed": lambda w, ids: w.T[:, ids],
    "stacked": lambda w, ids: jax.vmap(lambda w, i: w[i])(w.reshape(4, 1024, 128), ids.reshape(4, 4)),
    "one row": lambda w, ids: w[ids[0]],
    "first rows": lambda w, ids: jnp.ones((4, 16, 128)) + w[None, :16],
}


@pytest.mark.parametrize("name", [name if name == "two vmaps" else slow(name) for name in LOOKUPS])
def test_a_lookup_costs_its_rows(name):
    f = lambda p, ids: LOOKUPS[name](p["w"], ids)  # noqa: E731
    params, ids = {"w": jax.ShapeDtypeStruct(TABLE, jnp.float32)}, jax.ShapeDtypeStruct((16,), jnp.int32)
    config = LoRAPlusConfig(target_parameters={"w": "io"}, rank=8)
    lora, _ = init_lora(KEY, params, config, check=(f, ids))  # a warning would be an error
    step = jax.grad(lambda lora, p, ids: jnp.sum(jnp.sin(apply_lora_plus(f, config)(p, lora, ids))))
    compiled = jax.jit(step).lower(lora, params, ids).compile()
    # Rows, terms and their gradients; and A's gradient, of which a loop keeps three copies.
    values, factor = 16 * 128, TABLE[0] * 8
    assert compiled.cost_analysis()["flops"] < 3 * 2 * values * 8 + 10 * 4 * values + 2 * factor
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (10 * 4 * values + 3 * factor)
    assert not arrays_like(jax.make_jaxpr(step)(lora, params, ids).jaxpr, TABLE)
