"""The token loop reads each layer's weights in place, as counted in the compiled program, for the same tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.interpreter.unstack import OnLayers, join_layers, run_unstacked, split_layers, unstack
from loraplus_jax.linen import quantize_base
from loraplus_jax.models.decoding.generate import Sampling, make_generate, pad_left
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama
from loraplus_jax.plan.hlo import parse_hlo, shape_bytes

LAYERS, NEW = 3, 5
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=192,
    max_position_embeddings=64,
    initializer_range=0.3,
)
IDS, SEGMENTS = pad_left([[3, 1, 4, 1, 5], [9, 2]], multiple=8)
KEYS = jax.random.split(jax.random.key(0), len(IDS))
LLAMA = Llama(CONFIG)


@pytest.fixture(scope="module")
def llama():
    return jax.jit(LLAMA.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))


@pytest.mark.slow
def test_the_tokens_are_those_of_the_loop(llama):
    """With adapters over packed weights; the loop over layers is kept for variables on several devices."""
    model = apply_lora_plus(LLAMA, LoRAPlusConfig(target_modules=["q_proj", "down_proj"], rank=2))
    lora, specs = init_lora(model, jax.random.key(2), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), lora)
    variables = quantize_base(llama, "int8", specs) | {"lora": lora}
    generate = make_generate(model, CONFIG, new_tokens=NEW, stop=())
    tokens = np.asarray(generate(variables, IDS, SEGMENTS, Sampling(), KEYS))
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
    copies = jax.device_put(variables, jax.NamedSharding(mesh, jax.P()))
    assert any(unstack(variables, LAYERS))
    assert not any(unstack(copies, LAYERS))
    np.testing.assert_array_equal(tokens, generate(copies, IDS, SEGMENTS, Sampling(), KEYS))
    assert len(np.unique(tokens)) > NEW


@pytest.mark.slow
def test_the_token_loop_moves_each_weight_once(llama):
    """Counts in the compiled program: bytes of the loop's operations, and arrays with the shape of a weight."""
    generate = make_generate(LLAMA, CONFIG, new_tokens=NEW, stop=()).__wrapped__
    text = generate.lower(llama, unstack(llama, LAYERS), IDS, SEGMENTS, Sampling(), KEYS).compile().as_text()
    program = parse_hlo(text)
    loops = [x for x in next(reversed(program.values())) if x.opcode == "while"]
    bodies = [re.search(r"body=%?([\w.-]+)", loop.rest)[1] for loop in loops]
    body = max((program[name] for name in bodies), key=len)
    shapes = {x.name: x.shape for x in body}
    free = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
    work = [x for x in body if x.opcode not in free and not x.shape.startswith("(")]
    weights = {x.size for x in jax.tree.leaves(llama) if x.ndim == 3}
    made = [x for x in work if shape_bytes(x.shape) // 4 * LAYERS in weights]
    assert not made, [x.name for x in made]
    read = sum(shape_bytes(shapes[name]) for x in work for name in x.operands if name in shapes)
    total = sum(x.nbytes for x in jax.tree.leaves(llama))
    assert total < read < 1.2 * total


def test_views_share_the_memory_of_the_stack():
    stack = jnp.arange(LAYERS * 64, dtype=jnp.float32).reshape(LAYERS, 64)
    (views,) = unstack({"w": stack}, LAYERS)
    start = stack.unsafe_buffer_pointer()
    assert [view.unsafe_buffer_pointer() - start for view in views] == [256 * n for n in range(LAYERS)]
    donated = jax.jit(lambda x: x + 1, donate_argnums=0)(stack)
    np.testing.assert_array_equal(views[2], np.arange(128, 192))
    np.testing.assert_array_equal(donated[2], np.arange(129, 193))


def test_only_whole_stacks_on_one_device_have_views():
    stack = jnp.ones((LAYERS, 4))
    mesh = jax.sharding.Mesh(jax.devices()[:LAYERS], "data")
    sharded = jax.device_put(stack, jax.NamedSharding(mesh, jax.P("data")))
    assert unstack([stack[:2], sharded, np.ones((LAYERS, 4)), jnp.ones(())], LAYERS) == [()] * 4
    assert jax.jit(lambda x: len(unstack(x, LAYERS)[0]))(stack) == 0


@pytest.mark.slow
def test_any_loop_over_the_first_axis_is_run_step_by_step():
    def fn(variables, x):
        def body(carry, step):
            a, n = step
            return carry * variables["scale"] + a, carry + n

        last, outputs = jax.lax.scan(body, x, (variables["a"], jnp.arange(4.0)))
        backwards, _ = jax.lax.scan(lambda carry, a: (2 * carry + a, None), x, variables["a"], reverse=True)
        return {"last": last, "outputs": outputs, "backwards": backwards, "sum": variables["a"].sum()}

    variables = {"a": jnp.arange(8.0).reshape(4, 2), "scale": jnp.float32(3.0)}
    expected = fn(variables, jnp.ones(2))
    found = run_unstacked(fn, variables, unstack(variables, 4), jnp.ones(2))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_a_loop_that_slices_no_stack_stays_a_loop():
    def fn(variables):
        return jax.lax.scan(
            lambda carry, n: (carry + n * variables["a"], None), variables["a"], jnp.arange(4.0)
        )

    variables = {"a": jnp.ones((4, 2))}
    views = unstack(variables, 4)
    assert "scan" in str(jax.make_jaxpr(lambda: run_unstacked(fn, variables, views))())


@pytest.mark.parametrize("layers", [LAYERS, 0])
def test_a_program_on_layers_copies_no_weight(layers):
    """Its gradients are those on stacks; the slices are gone, forward and backward through unrolled layers."""
    rng = np.random.default_rng(0)
    width = 4 * LAYERS
    variables = {
        "w": jnp.asarray(rng.normal(size=(LAYERS, width, width)), jnp.float32),
        "bias": jnp.ones((1, width)),
    }

    def fn(x, variables):
        body = lambda x, w: (jnp.tanh(x @ w + variables["bias"]), None)  # noqa: E731
        return jax.lax.scan(body, x, variables["w"], unroll=LAYERS)[0].sum()

    of_layers = lambda x, variables: jax.grad(fn)(x, join_layers(variables))  # noqa: E731
    shapes = split_layers(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables), layers)
    assert isinstance(shapes["w"], tuple) == (layers > 0)
    assert shapes["bias"].shape == (1, width)
    x = jnp.ones((3, width))
    compiled = jax.jit(of_layers).lower(x, shapes).compile()
    program = OnLayers(compiled, layers)
    np.testing.assert_allclose(program(x, variables), jax.grad(fn)(x, variables), rtol=1e-6)
    others = variables | {"w": -variables["w"]}
    np.testing.assert_allclose(program(x, others), jax.grad(fn)(x, others), rtol=1e-6)
    made = [op for ops in parse_hlo(program.as_text()).values() for op in ops if op.opcode != "parameter"]
    copied = sum(op.shape.startswith(f"f32[{width},{width}]") for op in made)
    assert (copied == 0) == (layers > 0)
