"""A plan for TPUs, by the TPU compiler on a machine that has none."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from loraplus_jax import make_mesh
from loraplus_jax.models.attention import causal_attention
from loraplus_jax.plan.devices import TPUS, target_devices
from loraplus_jax.plan.hlo import collectives
from loraplus_jax.plan.plan import make_plan
from loraplus_jax.plan.programs import local_bytes, plan_step, try_compile
from loraplus_jax.settings.schema import MeshSettings
from loraplus_jax.step.sharding import with_mesh
from loraplus_jax.training.xla import compiler_options

from ..plan.tiny import GPT2, LLAMA, RANK, lower_pmap, parts_of, settings_of

libtpu = pytest.importorskip("libtpu", reason="pip install 'loraplus_jax[tpu-plan]'")
pytestmark = pytest.mark.slow

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("topology", "count"),
    [
        ("v4:2x2x1", 4),
        ("v5e:1x1", 1),
        ("v5e:16x16", 256),
        ("v5p:8x8x8", 512),
        ("v6e:2x4", 8),
    ],
)
def test_a_device_is_a_chip(topology, count):
    chip, devices = target_devices(topology)
    assert (chip, len(devices)) == (TPUS[topology.partition(":")[0]], count)
    assert {device.platform for device in devices} == {"tpu"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
    settings = settings_of(
        tmp_path_factory.mktemp("model"),
        LLAMA | sizes,
        task="instruction",
        model={"dtype": "bfloat16", "param_dtype": "bfloat16", "loss_chunk": 16},
        targets=PRODUCTS,
        mesh=MeshSettings(data=1, fsdp=4),
    )
    return make_plan(settings, "v5e:2x2")


def test_weights_are_split_and_fit(plan):
    assert (plan.device, plan.devices, plan.room) == ("TPU v5 lite", 4, 16_000_000_000)
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    norms = (2 * 5 + 1) * 128
    assert plan.memory["frozen weights"] == 2 * ((5 * layer + 2 * 512 * 128) // 4 + norms)
    assert plan.fits
    assert set(plan.roofline) == {"compute", "memory", "network"}


def gathers_of_weights(found, layers):
    """By the size of a layer's matrix, of which there are two, two and three: how often a layer gathers any.

    Whole, or as a ring of permutes over the four chips, each of a quarter.
    """
    times = collections.Counter()
    for c in found:
        size = {"all-gather": 1, "collective-permute": 4}.get(c.kind, 0) * c.bytes // 2
        if size in (128 * 128, 128 * 64, 128 * 256):
            times[size] += c.times * c.wire_bytes / (2 * size * 3 / 4) / layers
    return times


def test_a_layer_gathers_each_weight_once_forward_and_once_backward(plan):
    assert gathers_of_weights(plan.collectives, plan.layers) == {128 * 128: 4, 128 * 64: 4, 128 * 256: 6}


def test_the_head_is_gathered_once_for_all_pieces_of_the_loss(plan):
    head = [c for c in plan.collectives if c.shape == "bf16[128,512]"]
    assert [(c.kind, c.times) for c in head] == [("all-gather", 1)]


@pytest.mark.long
def test_a_layer_that_is_computed_again_gathers_no_weight_a_third_time(tmp_path):
    """Though a long attention lies between the recompute of q, k and v and their gradients."""
    settings = settings_of(
        tmp_path,
        LLAMA
        | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "max_position_embeddings": 2048},
        task="instruction",
        model={"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full", "attention": "blocked"},
        targets=PRODUCTS,
        mesh=MeshSettings(data=1, fsdp=4),
    )
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_length=2048))
    mesh = make_mesh(1, 4, devices=target_devices("v5e:2x2")[1])
    step = plan_step(settings, *parts_of(settings, tmp_path), mesh)
    program, _ = try_compile(step.lowered, compiler_options(mesh, unrolled=False))
    assert gathers_of_weights(collectives(program.as_text()), LLAMA["num_hidden_layers"]) == {
        128 * 128: 4,
        128 * 64: 4,
        128 * 256: 6,
    }


def test_chips_run_the_attention_kernel_without_collectives():
    mesh = make_mesh(1, 2, 2, devices=target_devices("v5e:2x2")[1])
    rows, heads = PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"), None, "tensor")

    def total(query, key, value, segments):
        return jnp.sum(jnp.square(causal_attention(query, key, value, segments)))

    shapes = [(4, 128, n, 64) for n in (4, 2, 2)]
    states = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, heads)) for shape in shapes
    ]
    segments = jax.ShapeDtypeStruct((4, 128), jnp.int32, sharding=NamedSharding(mesh, rows))
    program = jax.jit(with_mesh(jax.grad(total, (0, 1, 2)), mesh)).lower(*states, segments).compile()
    assert "splash_mha_fwd" in program.as_text()
    assert not collectives(program.as_text())


def test_the_pmap_step_compiles_and_donates_its_state(tmp_path):
    settings = settings_of(tmp_path, LLAMA, task="instruction", targets=("q_proj",))
    lowered, step = lower_pmap(settings, tmp_path, target_devices("v5e:2x2")[1])
    program = lowered.compile()
    assert {c.kind for c in collectives(program.as_text())} == {"all-reduce"}
    # On TPUs arrays are padded to tiles, so the sizes are lower bounds.
    held = local_bytes(*step.held["trained"]) + local_bytes(*step.held["optimizer"])
    assert program.memory_analysis().alias_size_in_bytes >= held


def test_only_adapters_and_single_numbers_are_reduced(plan):
    reduced = [c for c in plan.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    arrays = [
        [int(n) for n in dims.split(",") if n]
        for c in reduced
        for dims in re.findall(r"f\d+\[([\d,]*)\]", c.shape)
    ]
    assert any(RANK in dims for dims in arrays)
    assert all(RANK in dims or not dims for dims in arrays)


def test_a_gpt2_compiles_on_a_mesh_of_all_axes(tmp_path):
    settings = settings_of(
        tmp_path,
        GPT2 | {"n_embd": 128, "n_inner": 256, "vocab_size": 512},
        task="instruction",
        model={"dtype": "bfloat16", "param_dtype": "bfloat16"},
        targets=("c_attn", "c_proj", "c_fc"),
        mesh=MeshSettings(data=1, fsdp=2, tensor=2),
    )
    mesh = make_mesh(1, 2, 2, devices=target_devices("v5e:2x2")[1])
    step = plan_step(settings, *parts_of(settings, tmp_path), mesh)
    program, problem = try_compile(step.lowered, compiler_options(mesh, unrolled=False))
    assert program
    assert problem is None
    layer = 3 * 128 * 128 + 128 * 128 + 2 * 128 * 256
    adapters = 5 * RANK * (128 + 384 + 128 + 128 + 2 * (128 + 256))
    assert sum(x.size for x in jax.tree.leaves(step.held["trained"][0])) == adapters
    # Matrices are split four ways; norms, positions and most biases are not.
    split = 2 * (5 * layer + 512 * 128) // 4
    assert split < local_bytes(*step.held["frozen weights"]) < 1.1 * split
