"""Meshes that are refused, where rules put arrays, and the same steps on every mesh of eight devices as on one."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    init_state,
    jit_step,
    lora_plus_adamw,
    make_mesh,
)
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.models.bert import model as bert
from loraplus_jax.plan.hlo import collectives
from loraplus_jax.step.sharding import (
    adapter_shardings,
    base_shardings,
    batch_sharding,
    check_tensor,
    constrain_rows,
    distribute,
    local_rows,
    make_shardings,
)
from loraplus_jax.tasks.encoder import EncoderTask

from ..refusals import refusals
from ..zoo.properties import traced

KEY = jax.random.key(0)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


# Meshes


def test_a_free_size_takes_the_rest():
    asked = (-1, 2, 2), (2, -1, 1), (1, 1, -1), (4, 1, 1), (-1, 8, 1)
    found = [tuple(make_mesh(*sizes).shape.values()) for sizes in asked]
    assert found == [(2, 2, 2), (2, 4, 1), (1, 1, 8), (4, 1, 1), (1, 8, 1)]


class Far(NamedTuple):
    """A device of another host."""

    process_index: int


HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 48}
FAR = [Far(n // 4) for n in range(16)]

test_meshes_that_do_not_fit_name_the_number_to_change = refusals(
    (lambda: make_mesh(-1, 3, 1), "mesh", "fsdp 3", "tensor 1", "8 devices", "mesh.fsdp", "1, 2, 4, 8"),
    (lambda: make_mesh(-1, 2, 3), "8 devices", "mesh.tensor", "1, 2, 4"),
    (lambda: make_mesh(2, 8, 1), "data 2", "fsdp 8", "tensor 1", "16 devices", 8, "mesh.fsdp", "1, 2, 4"),
    (lambda: make_mesh(3, 1, 1), "3 devices", 8, "mesh.data", "1, 2, 4, 8"),
    (lambda: make_mesh(-1, -1, 1), "mesh.data", "mesh.fsdp", "mesh.tensor", -1),
    (lambda: make_mesh(1, 0, 1), "mesh.fsdp", -1, 8, 0),
    (lambda: make_mesh(-2, 1, 1), "mesh.data", -1, 8, -2),
    (lambda: make_mesh(1, 1, 9), "mesh.tensor", -1, 8, 9),
    (lambda: make_mesh(4, 1, 1, devices=FAR), "4 devices", 16, -1, "mesh.data"),
    (lambda: check_tensor(make_mesh(1, 1, 8), HEADS), "mesh.tensor", 8, "num_attention_heads", 12, "1, 2, 4"),
    error=ValueError,
)


def test_rows_are_sharded_over_data_and_fsdp():
    check_tensor(make_mesh(1, 1, 4), HEADS)  # which 4 divides
    assert local_rows(make_mesh(2, 2, 2), 8).tolist() == list(range(8))
    devices = np.array(jax.devices()).reshape(2, 4)
    by_tensor_first = Mesh(devices.T, ("fsdp", "data"))
    assert batch_sharding(by_tensor_first).spec == P(("data", "fsdp"))
    assert batch_sharding(Mesh(devices, ("model", "data"))).spec == P(("data",))


def test_rows_are_only_kept_split_where_a_mesh_is_in_use():
    x = jnp.ones((4, 2))
    assert constrain_rows(x) is x


# Rules


def test_rules_are_the_first_that_fit_and_leave_whole_what_does_not_divide():
    tree = {"q": {"kernel": shape(6, 8)}, "odd": {"kernel": shape(7, 8)}, "norm": {"scale": shape(8)}}
    rules = ((r".*/kernel", ("fsdp", "tensor")), (r"q/kernel", ("tensor",)), (r".*", ()))
    found = [s.spec for s in base_shardings(make_mesh(2, 2, 2), {"params": tree}, rules).values()]
    assert found == [P(), P(None, "tensor"), P("fsdp", "tensor")]  # norm, odd, q


BIAS = {"params": {"q": {"bias": shape(8)}}}

test_leaves_that_rules_do_not_fit = refusals(
    (lambda: base_shardings(make_mesh(), BIAS, ((r"q/kernel", ("fsdp",)),)), "q/bias"),
    (lambda: base_shardings(make_mesh(), BIAS, ((r".*", ("fsdp", None)),)), "q/bias", 2, "(8,)"),
)


def test_without_rules_the_longest_axis_is_split_and_never_the_layers():
    fields = {"kind": "dense", "axes": "io", "shape": (4096, 16, 8), "rank": 2, "scale": 1.0}
    spec = AdapterSpec(leaf="params/layers/kernel", stacked=(0,), **fields)
    tree = {"wide": shape(256, 512), "equal": shape(512, 512), "small": shape(8, 8), "odd": shape(3, 65537)}
    tree["layers"] = {"kernel": shape(4096, 16, 8)}
    found = base_shardings(make_mesh(1, 8, 1), {"params": tree}, specs={"layers": spec})
    split = {path: s.spec for path, s in found.items() if s.spec != P()}
    assert split.pop("params/layers/kernel") == P(None, "fsdp", None)
    assert split == dict.fromkeys(("params/wide", "params/equal"), P(None, "fsdp"))


@pytest.mark.parametrize(
    ("axes", "sizes", "stacked", "base", "a", "b"),
    [
        ("io", (8, 8), (), P("fsdp", "tensor"), P("fsdp", None), P(None, "tensor")),
        ("io", (2, 8, 8), (0,), P(None, "fsdp", "tensor"), P(None, "fsdp", None), P(None, None, "tensor")),
        ("io", (8, 2, 8), (1,), P("fsdp", None, "tensor"), P("fsdp", None, None), P(None, None, "tensor")),
        ("ooi", (8, 2, 8), (), P("tensor", None, "fsdp"), P("fsdp", None), P(None, "tensor", None)),
        ("eio", (4, 8, 8), (), P("fsdp", None, "tensor"), P("fsdp", None, None), P("fsdp", None, "tensor")),
    ],
)
def test_a_factor_is_sharded_as_its_side_of_the_base(axes, sizes, stacked, base, a, b):
    spec = AdapterSpec(
        leaf="params/m/w", kind="einsum", axes=axes, shape=sizes, rank=2, scale=1.0, stacked=stacked
    )
    place = jax.sharding.NamedSharding(make_mesh(2, 2, 2), base)
    found = adapter_shardings({"m": spec}, {"params/m/w": place})
    assert {path: s.spec for path, s in found.items()} == {"lora/m/lora_a": a, "lora/m/lora_b": b}


# Two models


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 16}


class Subject:
    """A tiny BERT with adapters, its loss, and a batch of 16 rows."""

    def __init__(self):
        ids = jax.random.randint(jax.random.key(1), (16, 12), 3, 64)
        inputs = ids, jnp.ones_like(ids), jnp.zeros_like(ids)
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = bert.BertConfig(type_vocab_size=2, pad_token_id=0, **SIZES, **off)
        net = bert.BertForSequence(config, num_outputs=3, head_dropout=0.0)
        self.batch = dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=True))
        self.batch |= {"label": jnp.arange(16) % 3, "weight": 1.0 + jnp.arange(16.0) % 3}
        targets = r".*/(query|key|value|out|up|down|word)"
        model = apply_lora_plus(net, LoRAPlusConfig(target_modules=targets, rank=2))
        self.frozen = {"params": jax.jit(net.init)(KEY, *inputs)["params"]}
        lora, self.specs = traced(model, *inputs)
        # As large as the base's own weights: where adapters outweigh them, curves part for rounding's sake alone.
        rng = np.random.default_rng(2)
        self.trainable = {"lora": jax.tree.map(lambda x: 0.02 * rng.normal(size=x.shape).astype("f"), lora)}
        self.loss = EncoderTask(kind="classification", names=("a", "b", "c")).loss_fn(model)
        fields = {"weight_decay": 0.01, "max_grad_norm": 1.0, "eps": 1e-6, "specs": self.specs}
        self.tx = lora_plus_adamw(2.5e-4, lr_ratio=4.0, **fields)

    def start(self):
        return init_state(self.trainable, self.tx, KEY)

    @functools.cache  # noqa: B019
    def on(self, sizes):
        """The compiled step on a mesh, shardings, and frozen variables and batch placed there."""
        mesh = make_mesh(*sizes)
        shardings = make_shardings(mesh, self.start(), self.frozen, specs=self.specs, rules=bert.SHARDING)
        step = jit_step(self.loss, self.tx, mesh=mesh, shardings=shardings)
        placed = distribute(self.frozen, shardings.frozen), jax.device_put(self.batch, batch_sharding(mesh))
        state = jax.eval_shape(lambda: self.start())
        return step.lower(state, *placed).compile(), shardings, placed


@pytest.fixture(scope="module")
def subject():
    return Subject()


def test_a_step_is_the_same_on_a_mesh_of_all_axes(subject):
    one = jit_step(subject.loss, subject.tx)
    step, shardings, placed = subject.on((2, 2, 2))
    before = subject.start()
    for _ in range(3):
        kept = jax.tree.map(jnp.array, before)
        got, found = step(distribute(kept, shardings.state), *placed)
        before, metrics = one(before, subject.frozen, subject.batch)
        for x, y in zip(*map(jax.tree.leaves, (got.trainable, before.trainable)), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
        assert {path: leaf.sharding.spec for path, leaf in leaves_by_path(got.trainable).items()} == {
            path: place.spec for path, place in leaves_by_path(shardings.state.trainable).items()
        }
        for name, value in metrics.items():
            # Of sums that cancel, as gradients do, float32 keeps fewer digits: on a data mesh too.
            rtol = 5e-5 if name.startswith("grad_norm") else 2e-6
            np.testing.assert_allclose(found[name], value, rtol=rtol)


# What travels


@pytest.mark.slow
def test_on_a_data_mesh_only_gradients_of_adapters_and_scalars_are_communicated(subject):
    step, _, _ = subject.on((8, 1, 1))
    found = collectives(step.as_text())
    assert {one.kind for one in found} == {"all-reduce"}
    adapters = 4 * sum(x.size for x in jax.tree.leaves(subject.trainable))
    base = 4 * sum(x.size for x in jax.tree.leaves(subject.frozen))
    total = sum(one.times * one.bytes for one in found)
    assert adapters <= total < min(adapters + 64, base / 4)


@pytest.mark.slow
def test_fsdp_all_gathers_weights_and_no_rows(subject):
    """What is gathered over fsdp has no batch axis, but for the ids of tokens."""
    step, _, _ = subject.on((1, 8, 1))
    rows, tokens = subject.batch["input_ids"].shape
    gathered = [one.bytes for one in collectives(step.as_text()) if one.kind == "all-gather"]
    assert gathered
    assert max(gathered) <= 4 * max(64 * 32, 32 * 48)
    assert 4 * rows * tokens * SIZES["hidden_size"] not in gathered


@pytest.mark.slow
def test_memory_of_a_device_falls_with_fsdp(subject):
    whole, _, _ = subject.on((8, 1, 1))
    split, _, _ = subject.on((1, 8, 1))
    sizes = [step.memory_analysis().argument_size_in_bytes for step in (whole, split)]
    base = 4 * sum(x.size for x in jax.tree.leaves(subject.frozen))
    assert sizes[0] - sizes[1] > 0.7 * base


@pytest.mark.parametrize("rules", [None, ((r"q/kernel", ("fsdp", None)), (r".*", ()))])
def test_variables_in_flax_s_boxes_have_the_shardings_of_plain_ones(rules):
    mesh = make_mesh(2, 4)
    spec = AdapterSpec(leaf="params/q/kernel", kind="dense", axes="io", shape=(512, 512), rank=2, scale=1.0)
    factors = {"lora_a": jnp.ones((512, 2)), "lora_b": jnp.ones((2, 512))}
    state = init_state({"lora": {"q": factors}}, lora_plus_adamw(1e-3, 4.0), jax.random.key(0))
    plain = {"params": {"q": {"kernel": jnp.ones((512, 512))}}}
    boxed = {"params": {"q": {"kernel": nn.Partitioned(jnp.ones((512, 512)), (None, "fsdp"))}}}
    found, expected = (make_shardings(mesh, state, x, specs={"q": spec}, rules=rules) for x in (boxed, plain))
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)
    assert isinstance(distribute(boxed, found.frozen)["params"]["q"]["kernel"], nn.Partitioned)
