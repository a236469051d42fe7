"""Models that nobody here wrote, adapted, trained and merged; each at a small random size.

`.ci/run` installs the packages; where one is missing its models are skipped.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, lora_plus_adamw, merge

from ..messages import mentions
from .harness import assert_close, assert_equal, drawn
from .tiny_gemma import config_of

# Two of the models use an adapted parameter as a whole, which is said.
pytestmark = pytest.mark.filterwarnings("ignore:.*needs the whole weight")

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
RANK, ALPHA, RATE, RATIO, STEPS = 2, 4.0, 0.005, 4.0, 30


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of another package.

    Attributes:
      model: the plain one.
      args, kwargs: of a call.
      rules: what to adapt, as fields of `LoRAPlusConfig`.
      specs: path of every adapter that these give to its kind, axes and weight's shape, from literals.
      read: takes the array to train on from what the model returns.
      mutable: collections that a call changes.
    """

    model: nn.Module
    args: tuple[Any, ...]
    rules: dict[str, Any]
    specs: dict[str, tuple[str, str, tuple[int, ...]]]
    read: Callable[[Any], jax.Array] = lambda out: out
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    mutable: tuple[str, ...] = ()


def gemma():
    """Raw weights in an Einsum and an Embedder of its own, all under `nn.jit`."""
    pytest.importorskip("gemma")
    from gemma import gm

    config = config_of(gm, final_logit_softcap=30.0)
    weights = {
        "attn/q_einsum/w": ("oio", (4, 16, 6)),
        "attn/kv_einsum/w": ("boio", (2, 2, 16, 6)),
        "attn/attn_vec_einsum/w": ("iio", (4, 6, 16)),
        "mlp/gating_einsum": ("bio", (2, 16, 24)),
        "mlp/linear": ("io", (24, 16)),
    }
    rules = {f"layer_./{name}": axes for name, (axes, _) in weights.items()}
    specs = {
        f"layer_{n}/{name}": ("parameter", axes, shape)
        for n in range(2)
        for name, (axes, shape) in weights.items()
    }
    embedder = "embedder/input_embedding"
    return Case(
        model=gm.nn.Transformer(config=config, dtype=jnp.float32),
        args=(jnp.array([[2, 5, 7, 11, 9, 4], [2, 8, 3, 3, 6, 1]]),),
        rules={"target_parameters": rules | {embedder: "io"}},
        specs=specs | {embedder: ("parameter", "io", (32, 16))},
        read=lambda out: out.logits,
    )


def siglip():
    """The image encoder of gemma: a convolution, attention of Flax's own, two layers of three."""
    pytest.importorskip("gemma")
    from gemma.multimodal import vision_utils

    block = "Transformer/encoderblock_{}/"
    names = {
        "MultiHeadDotProductAttention_0/query": ("dense_general", "ioo", (16, 2, 8)),
        "MultiHeadDotProductAttention_0/out": ("dense_general", "iio", (2, 8, 16)),
        "MlpBlock_0/Dense_1": ("dense", "io", (24, 16)),
    }
    return Case(
        model=vision_utils.ViTModel(patch_size=(4, 4), width=16, depth=3, mlp_dim=24, num_heads=2),
        args=(jax.random.normal(KEY, (2, 8, 8, 3)),),
        rules={
            "target_modules": r".*/encoderblock_[02]/.*(query|out|Dense_1)",
            "target_parameters": {"embedding/kernel": "iiio", "pos_embedding": "bio"},
        },
        specs={block.format(n) + name: spec for n in (0, 2) for name, spec in names.items()}
        | {
            "embedding/kernel": ("parameter", "iiio", (4, 4, 3, 16)),
            "pos_embedding": ("parameter", "bio", (1, 4, 16)),
        },
    )


def ablanx(layers=None):
    """The block of an antibody language model in `nn.scan` and `nn.remat`."""
    block = pytest.importorskip("ablang_jax.model").Block

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(
                nn.remat(block, static_argnums=(4,)),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=3,
            )
            return blocks(name="blocks")(x, jnp.ones(x.shape[:2]), jnp.ones(12), False)[0]

    return Case(
        model=Encoder(),
        args=(jax.random.normal(KEY, (2, 5, 480)),),
        rules={"target_modules": ["q_proj", "ffn_out"], "layers_to_transform": layers},
        specs={
            "blocks/q_proj": ("dense", "io", (3, 480, 480)),
            "blocks/ffn_out": ("dense", "io", (3, 1920, 480)),
        },
    )


def resnet():
    """Convolutions, and batch statistics of a class of its own."""
    flaxmodels = pytest.importorskip("flaxmodels")
    weights = {
        "Conv_0": ("conv", "iiio", (7, 7, 3, 64)),
        "BasicBlock_2/Conv_2": ("conv", "iiio", (1, 1, 64, 128)),
        "BasicBlock_7/Conv_1": ("conv", "iiio", (3, 3, 512, 512)),
        "Dense_0": ("dense", "io", (512, 5)),
    }
    return Case(
        model=flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=5),
        args=(jax.random.uniform(KEY, (4, 32, 32, 3)),),
        rules={"target_modules": "|".join(weights)},
        specs=weights,
        mutable=("batch_stats",),
    )


def e3x():
    """An equivariant network over a graph: names such as `1-`, and kernels of seven axes."""
    pytest.importorskip("e3x")
    import e3x

    class Network(nn.Module):
        @nn.compact
        def __call__(self, kinds, places, out, to):
            near = e3x.nn.basis(
                places[to] - places[out],
                max_degree=2,
                num=4,
                radial_fn=e3x.nn.reciprocal_bernstein,
                cutoff_fn=e3x.nn.smooth_cutoff,
            )
            x = e3x.nn.Embed(num_embeddings=5, features=8, name="embed")(kinds)
            y = e3x.nn.MessagePass(max_degree=2, name="message")(x, near, dst_idx=out, src_idx=to)
            y = e3x.nn.Dense(8, name="mix")(e3x.nn.add(x, y))
            y = e3x.nn.TensorDense(max_degree=1, name="square")(e3x.nn.relu(y))
            return e3x.nn.Dense(1, name="energy")(y)[:, 0, 0, 0]

    out, to = e3x.ops.sparse_pairwise_indices(4)
    return Case(
        model=Network(),
        args=(jnp.array([1, 2, 2, 4]), 0.3 * jax.random.normal(KEY, (4, 3)), out, to),
        rules={
            "target_modules": ["mix/0+", "mix/1-"],
            "target_parameters": {"embed/embedding": "ibco", "message/tensor/kernel": "aibcdeo"},
            "rank": 1,
        },
        specs={
            "mix/0+": ("dense", "io", (8, 8)),
            "mix/1-": ("dense", "io", (8, 8)),
            "embed/embedding": ("parameter", "ibco", (5, 1, 1, 8)),
            "message/tensor/kernel": ("parameter", "aibcdeo", (1, 3, 1, 1, 1, 3, 8)),
        },
    )


CASES = {make.__name__: make for make in (gemma, siglip, ablanx, resnet, e3x)}
every = pytest.mark.parametrize("name", CASES)


class Adapted:
    """The adapted model of a case, its variables, and both models compiled, with changed collections given back."""

    def __init__(self, case, **fields):
        config = LoRAPlusConfig(**{"rank": RANK, "alpha": ALPHA} | case.rules | fields)
        self.case, self.model = case, apply_lora_plus(case.model, config)
        self.base = jax.jit(case.model.init)(KEY, *case.args)
        self.lora, self.specs = init_lora(self.model, KEY, *case.args, base=self.base)
        self.plain, self.run = self.compiled(case.model), self.compiled(self.model)

    def compiled(self, model):
        case = self.case
        return jax.jit(lambda v: model.apply(v, *case.args, **case.kwargs, mutable=case.mutable))

    def merged(self, lora):
        return self.base | merge({"params": self.base["params"]}, lora, self.specs)


@functools.cache
def adapted(name):
    return Adapted(CASES[name]())


@every
def test_the_adapters_are_where_the_rules_say_and_do_nothing_at_first(name):
    it = adapted(name)
    assert {path: (spec.kind, spec.axes, spec.shape) for path, spec in it.specs.items()} == it.case.specs
    found, expected = it.run(it.base | {"lora": it.lora}), it.plain(it.base)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(found, expected, 1e-6, least=1.0)


@every
def test_training_moves_only_the_adapters_and_merges(name):
    it = adapted(name)
    kept = jax.tree.map(np.array, it.base)
    tx = lora_plus_adamw(RATE, lr_ratio=RATIO, specs=it.specs)
    start = it.case.read(it.plain(it.base)[0])
    target = jax.random.normal(jax.random.key(4), start.shape)

    def loss(lora):
        out, after = it.model.apply(it.base | {"lora": lora}, *it.case.args, mutable=True)
        return jnp.mean((it.case.read(out) - target) ** 2), after

    @jax.jit
    def step(lora, state):
        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value, after

    lora, state, losses = it.lora, tx.init(it.lora), []
    for _ in range(STEPS):
        before = lora
        lora, state, value, after = step(lora, state)
        losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0], losses
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (lora, it.lora)), strict=True))
    # Neither the base nor what a call with everything mutable gives back for it has changed by a bit.
    assert_equal(it.base, kept)
    assert_equal((after["params"], after["lora"]), (kept["params"], before))

    found = it.run(it.base | {"lora": lora})
    assert_close(found, it.plain(it.merged(lora)), 1e-4, least=1.0)
    assert float(jnp.abs(it.case.read(found[0]) - start).max()) > 0.01


def test_batch_statistics_move_as_in_the_plain_model():
    it = adapted("resnet")
    moved = it.run(it.base | {"lora": it.lora})[1]["batch_stats"]
    assert_close(moved, it.plain(it.base)[1]["batch_stats"], 1e-6, least=1.0)
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (moved, it.base["batch_stats"])), strict=True)
    )


def test_gemma_decodes_with_its_cache():
    it = adapted("gemma")
    lora, tokens = drawn(it.lora), it.case.args[0]
    fields = {"batch_size": 2, "dtype": jnp.float32, "cache_length": 4}
    results = []
    for net, variables in ((it.model, it.base | {"lora": lora}), (it.case.model, it.merged(lora))):
        cache, logits = net.apply(variables, method="init_cache", **fields), []
        for n in range(3):
            positions, seen = jnp.full((2, 1), n), jnp.broadcast_to(jnp.arange(4) <= n, (2, 1, 4))
            more = {"cache": cache, "positions": positions, "attention_mask": seen}
            out = net.apply(variables, tokens[:, n : n + 1], **more)
            cache = out.cache
            logits.append(out.logits)
        results.append((logits, cache))
    assert_close(*results, 1e-4, least=1.0)


@pytest.mark.parametrize("target", [r".*/(q|kv)_einsum", ["attn_vec_einsum"], r".*/mlp"])
def test_an_einsum_of_gemmas_own_is_rejected_with_what_to_name_instead(target):
    with pytest.raises(ValueError, match=mentions("target_modules", "target_parameters")):
        Adapted(dataclasses.replace(gemma(), rules={"target_modules": target}))


def test_all_linear_finds_nothing_to_adapt_in_gemma():
    with pytest.raises(ValueError, match=mentions("target_modules", "'all-linear'")):
        Adapted(dataclasses.replace(gemma(), rules={"target_modules": "all-linear"}))


@pytest.mark.parametrize("layers", [(0,), (1, 2)])
def test_some_layers_of_a_stack(layers):
    it = Adapted(ablanx(layers))
    assert {path: spec.layers for path, spec in it.specs.items()} == dict.fromkeys(it.case.specs, layers)
    # A layer that is not meant has two zero factors, of the others one is zero.
    for factors in it.lora["blocks"].values():
        assert [n for n in range(3) if factors["lora_a"][n].any()] == list(layers)
    lora = jax.tree.map(lambda x: x.at[jnp.array(layers)].set(0.1), it.lora)
    assert_close(it.run(it.base | {"lora": lora}), it.plain(it.merged(lora)), 1e-4, least=1.0)


@pytest.mark.parametrize("fields", [{}, {"alpha": 40.0}, {"rank": 3}])
def test_one_net_in_many_configs(fields):
    """`nn.jit` inside gemma would take the trace of one config for another."""
    it = Adapted(
        dataclasses.replace(gemma(), rules={"target_parameters": {".*/q_einsum/w": "oio"}}), **fields
    )
    lora = drawn(it.lora)
    assert_close(it.run(it.base | {"lora": lora}), it.plain(it.merged(lora)), 1e-4, least=1.0)
