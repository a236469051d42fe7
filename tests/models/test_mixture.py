"""A mixture of experts against the sum over all of them in float64: alone, on a mesh, with adapters of each row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge
from loraplus_jax.adapter import apply_rows, select_adapters, stack_adapters
from loraplus_jax.adapter.tree import flatten, unflatten
from loraplus_jax.interop import Adapter
from loraplus_jax.models.families import family_of
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import LlamaMixture
from loraplus_jax.models.mixture import mix
from loraplus_jax.step.sharding import (
    adapter_shardings,
    base_shardings,
    make_mesh,
    replicate,
    shard_batch,
    with_mesh,
)

from .. import tiny

SIZES = {"x": (4, 6, 16), "shares": (4, 6, 2), "gate_up": (4, 16, 20), "down": (4, 10, 16)}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    values = {name: 0.5 * rng.normal(size=size).astype(np.float32) for name, size in SIZES.items()}
    # Nobody chooses the last expert.
    chosen = np.array([rng.choice(3, 2, replace=False) for _ in range(24)]).reshape(4, 6, 2).astype(np.int32)
    return values, chosen


def outputs(values, chosen, form=mix):
    """The sum, and a loss's gradients by every other input."""

    def loss(values):
        y = form(
            values["x"], values["shares"], chosen, values["gate_up"], values["down"], activation=jax.nn.silu
        )
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(values)
    return {"y": y, **gradients}


def every(x, shares, chosen, gate_up, down, *, activation):
    """Each expert on every token."""
    gate, up = jnp.split(jnp.einsum("btd,edi->btei", x, gate_up), 2, axis=-1)
    y = jnp.einsum("btei,eid->bted", activation(gate) * up, down)
    share = jnp.einsum("btk,btke->bte", shares, jax.nn.one_hot(chosen, len(down), dtype=x.dtype))
    return jnp.einsum("bted,bte->btd", y, share)


@pytest.fixture(scope="module")
def expected(inputs):
    with jax.enable_x64(True):
        values = jax.tree.map(lambda x: x.astype(np.float64), inputs[0])
        return jax.tree.map(np.asarray, outputs(values, inputs[1], every))


def check(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6 * np.abs(value).max(), err_msg=name)


@pytest.fixture(autouse=True, params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """Products by blocks, and by `ragged_dot`, which CPUs can compute too."""
    monkeypatch.setattr("loraplus_jax.models.mixture.target_platform", lambda: request.param)
    return request.param


def test_a_router_is_computed_in_float32(monkeypatch):
    """Shares of bfloat16 models are those of float64, rounded once: transformers' router computes in float32."""
    found = {}

    def taken(x, shares, chosen, *kernels, activation):
        found.update(shares=shares, chosen=chosen)
        return x

    monkeypatch.setattr("loraplus_jax.models.llama.model.mix", taken)
    config = LlamaConfig.from_hf(tiny.config("mixtral", num_local_experts=16, num_experts_per_tok=4))
    model = LlamaMixture(config, jnp.bfloat16, jnp.bfloat16)
    x = jnp.eye(config.hidden_size, dtype=jnp.bfloat16)[None]  # so that scores are the kernel's rows
    params = model.init(jax.random.key(0), x)["params"]
    scores = jax.random.normal(jax.random.key(1), (config.hidden_size, 16)).astype(jnp.bfloat16)
    model.apply({"params": {**params, "gate": {"kernel": scores}}}, x)
    exact = np.exp(np.asarray(scores, np.float64))
    order = np.argsort(-exact, axis=1, kind="stable")[:, :4]
    shares = np.take_along_axis(exact, order, axis=1)
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(found["chosen"][0], order)
    np.testing.assert_array_equal(found["shares"][0], shares.astype(jnp.bfloat16))


def test_every_token_gets_the_sum_of_its_experts(inputs, expected):
    check(jax.jit(outputs)(*inputs), expected)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 4), (8, 1, 1), (1, 1, 8)])
def test_devices_share_rows_and_experts(sizes, inputs, expected):
    """Also where the rows or the experts do not divide."""
    mesh = make_mesh(*sizes)
    check(jax.jit(with_mesh(outputs, mesh))(*replicate(mesh, inputs)), expected)


IDS = np.array([[5, 9, 2, 7], [1, 8, 3, 3], [4, 4, 6, 0]], np.int32)


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def model(request):
    """A model with adapters of attention, router and experts, and its variables, the adapters' random."""
    kind = family_of(request.param)
    net = kind.model(kind.config.from_hf(tiny.config(request.param)))
    config = LoRAPlusConfig(
        target_modules=["q_proj", "mlp/gate"], target_parameters={".*/experts/.*": "leio"}, rank=2, alpha=4
    )
    adapted = apply_lora_plus(net, config)
    base = net.init(jax.random.key(0), IDS)
    lora, specs = init_lora(adapted, jax.random.key(1), IDS, base=base)
    rng = np.random.default_rng(1)
    loras = [
        jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), lora) for _ in range(2)
    ]
    return net, adapted, config, base, specs, loras


def test_adapters_of_experts_are_their_merged_weights(model):
    net, adapted, _, base, specs, (lora, _) = model
    found = adapted.apply({**base, "lora": lora}, IDS)
    wanted = net.apply(merge(base, lora, specs), IDS)
    assert np.abs(found - net.apply(base, IDS)).max() > 1e-2, "the adapter does nothing"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_rows_with_adapters_of_their_own(model):
    _, adapted, config, base, specs, loras = model
    stack = stack_adapters([Adapter(lora, specs, config, {}) for lora in loras], slots=2)
    own = select_adapters(stack, jnp.array([1, 0, 1]))
    found = apply_rows(apply_lora_plus(model[0], stack.config).apply, base, own, IDS)
    for row, n in enumerate((1, 0, 1)):
        wanted = adapted.apply({**base, "lora": loras[n]}, IDS[row : row + 1])
        np.testing.assert_allclose(found[row], wanted[0], rtol=0, atol=1e-5)
    mesh = make_mesh(2, 1, 4)

    def on_mesh(base, adapters, ids):
        net = apply_lora_plus(model[0], stack.config)
        return apply_rows(net.apply, base, adapters, ids, mesh_axes=("data", "fsdp"))

    four = select_adapters(stack, jnp.array([1, 0, 1, 0]))
    given = replicate(mesh, (base, four)), shard_batch(np.concatenate([IDS, IDS[:1]]), mesh)
    split = jax.jit(with_mesh(on_mesh, mesh))(*given[0], given[1])
    np.testing.assert_allclose(split[:3], found, rtol=0, atol=1e-5)


def test_adapters_of_split_experts_have_the_gradients_of_one_device(model):
    _, adapted, _, base, specs, (lora, _) = model
    ids = np.concatenate([IDS, IDS[:1]])

    def gradients(lora, base, ids):
        return jax.grad(lambda lora: jnp.sum(jnp.sin(adapted.apply({**base, "lora": lora}, ids))))(lora)

    wanted = jax.jit(gradients)(lora, base, ids)
    mesh = make_mesh(2, 1, 4)
    split = base_shardings(mesh, base, family_of("mixtral").sharding, specs=specs)
    split |= adapter_shardings(specs, split)
    variables = flatten({**base, "lora": lora})
    given = unflatten({path: jax.device_put(x, split[path]) for path, x in variables.items()})
    given = given.pop("lora"), given
    for path in (
        "params/layers/mlp/experts/down_proj/kernel",
        "lora/layers/mlp/experts/down_proj/kernel/lora_a",
    ):
        assert split[path].spec[1] == "tensor", "experts are not split"
    found = jax.jit(with_mesh(gradients, mesh))(*given, shard_batch(ids, mesh))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max()), found, wanted
    )


def test_a_token_costs_the_experts_that_it_chose(platform):
    """At most twice, for the zeros that fill blocks: not all sixteen, as by XLA's own ragged product on a CPU."""
    if platform == "tpu":
        pytest.skip("only a TPU's compiler groups products")
    experts, tokens, count, width, inner = 16, 96, 2, 64, 48
    shapes = [(1, tokens, width), (1, tokens, count), (experts, width, 2 * inner), (experts, inner, width)]
    x, shares, gate_up, down = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    chosen = jax.ShapeDtypeStruct(shares.shape, jnp.int32)
    lowered = jax.jit(functools.partial(mix, activation=jax.nn.silu)).lower(x, shares, chosen, gate_up, down)
    ideal = 2 * tokens * count * 3 * width * inner
    assert ideal < lowered.compile().cost_analysis()["flops"] < 2.3 * ideal
