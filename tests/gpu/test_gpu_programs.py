"""Steps compiled for NVIDIA GPUs on a machine that has none: kernels, dtypes, collectives, memory, FLOPs."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from loraplus_jax import make_mesh
from loraplus_jax.plan.devices import GPUS, target_devices
from loraplus_jax.plan.hlo import array_shapes, collectives, execution_counts, parse_hlo
from loraplus_jax.plan.programs import local_bytes, plan_step
from loraplus_jax.plan.search import hosts_along
from loraplus_jax.settings.schema import MeshSettings
from loraplus_jax.step.population import MEMBER_AXIS, map_members
from loraplus_jax.sweep.member_programs import first_member, make_member_step
from loraplus_jax.sweep.settings import SweepRun, SweepSettings
from loraplus_jax.training.optimizer import make_optimizer

from ..plan.tiny import BERT, LLAMA, lower_pmap, parts_of, settings_of

pytest.importorskip("jax_cuda13_plugin", reason="pip install 'loraplus_jax[gpu-plan]'")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]

SMALL = LLAMA | {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 256, "vocab_size": 512}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 256}
ENCODER = BERT | {"hidden_size": 64, "intermediate_size": 128}
TARGETS = ("q_proj", "v_proj", "down_proj")
BF16 = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


def llama(directory, *, model=(), mesh=(1, 1, 1), length=128, lora=(), **others):
    settings = settings_of(
        directory,
        SMALL,
        task="instruction",
        model=BF16 | dict(model),
        targets=TARGETS,
        mesh=MeshSettings(**dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))),
        **others,
    )
    data = dataclasses.replace(settings.data, max_length=length)
    return dataclasses.replace(settings, data=data, lora=dataclasses.replace(settings.lora, **dict(lora)))


def encoder(directory, *, model=(), **others):
    model = {"dtype": "bfloat16"} | dict(model)
    return settings_of(directory, ENCODER, task="classification", model=model, targets=("query",), **others)


def lower(settings, directory, devices):
    mesh = make_mesh(**dataclasses.asdict(settings.mesh), devices=devices)
    return plan_step(settings, *parts_of(settings, directory), mesh)


@functools.cache
def gpus(topology):
    return target_devices(topology)[1]


def compiled(settings, directory, topology):
    step = lower(settings, directory, gpus(topology))
    program = step.lowered.compile()
    check_donated(program, *step.held["trained"], *step.held["optimizer"])
    return program.as_text()


def check_donated(program, trained, places, state, state_places):
    """The new state takes the memory of the old one."""
    stats = program.memory_analysis()
    assert stats.alias_size_in_bytes >= local_bytes(trained, places) + local_bytes(state, state_places)
    # What else comes out are metrics.
    assert stats.output_size_in_bytes - stats.alias_size_in_bytes < 1000


def products(text):
    """The matrix products of a program: how often each runs, by (dtypes of its operands, FLOPs)."""
    program, found = parse_hlo(text), Counter()
    times = execution_counts(program)
    for name, instructions in program.items():
        by_name = {i.name: i for i in instructions}
        for one in instructions:
            if one.opcode == "dot":
                (left, shape), (right, _) = (array_shapes(by_name[n].shape)[0] for n in one.operands[:2])
                contracted = [
                    int(n) for n in re.search(r"lhs_contracting_dims={([\d,]+)}", one.rest)[1].split(",")
                ]
                size = 2
                for n in [*array_shapes(one.shape)[0][1], *(shape[axis] for axis in contracted)]:
                    size *= n
                found[frozenset((left, right)), size] += times[name]
    return found


def flops(text):
    return sum(size * times for (_, size), times in products(text).items())


def dtypes(text):
    return {kind for kinds, _ in products(text) for kind in kinds}


def float32_products(text):
    """Parts of the model whose products have a float32 operand, from XLA's metadata."""
    program, found = parse_hlo(text), set()
    for instructions in program.values():
        by_name = {i.name: i for i in instructions}
        for one in instructions:
            if one.opcode == "dot" and any("f32[" in by_name[n].shape for n in one.operands[:2]):
                found.add(re.search(r'op_name="([^"]*)"', one.rest)[1])
    return found


def calls(text):
    """Custom calls of a program, by their target."""
    return Counter(re.findall(r'custom_call_target="([^"]+)"', text))


@pytest.mark.parametrize(
    ("make", "options", "count"),
    [
        (llama, {"model": {"attention": "blocked"}}, 1),
        (
            llama,
            {
                "model": {"attention": "blocked", "quantize": "nf4", "remat": "full"},
                "train": {"accumulate": 2},
                "mesh": (1, 4, 2),
            },
            8,
        ),
        # On a CPU, an encoder is unrolled otherwise, and leaves out the gradient of the first layer's input.
        (encoder, {"model": {"unroll": False}, "mesh": MeshSettings(data=8)}, 8),
    ],
    ids=["llama", "split nf4 in micro-batches", "encoder"],
)
def test_a_step_has_the_products_of_the_cpu_program(tmp_path, make, options, count):
    settings = make(tmp_path, **options)
    text = compiled(settings, tmp_path, f"h100:{count}")
    assert not calls(text).keys() & {"__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"}
    cpu = lower(settings, tmp_path, jax.devices()[:count]).lowered.compile().as_text()
    assert flops(text) == pytest.approx(flops(cpu), rel=0.01)
    if count == 1:
        assert dtypes(text) == {"bf16"}
    if make is encoder:
        # JAX keeps the gradient of the scores in float32.
        assert all("BTNH,BSNH->BNTS" in where for where in float32_products(text))
        # Only gradients of adapters are reduced.
        assert {c.kind for c in collectives(text)} == {"all-reduce"}


def test_collectives_between_hosts(tmp_path):
    settings = llama(tmp_path, mesh=(2, 4, 1))
    devices = gpus("h100:2x4")
    text = lower(settings, tmp_path, devices).lowered.compile().as_text()
    found = collectives(text, [device.process_index for device in devices])
    # Weights are gathered within a host; gradients are reduced over both.
    assert {c.hosts for c in found if c.kind == "all-gather" and "/layers/" in c.where} == {1}
    assert {c.hosts for c in found if c.kind == "all-reduce"} >= {2}
    split = make_mesh(2, 4, 1, devices=devices)
    assert [hosts_along(split, axis) for axis in split.axis_names] == [2, 1, 1]


def test_attention_auto_is_cudnn_on_each_device_s_rows_and_heads(tmp_path):
    settings = llama(tmp_path, model={"quantize": "nf4"}, mesh=(1, 4, 2))
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, packing=True))
    text = compiled(settings, tmp_path, "h100:8")
    assert dtypes(text) == {"bf16"}
    found = calls(text)
    # Packed rows are a mask, so a bias of the scores; the backward pass recomputes nothing.
    assert found["__cudnn$fmhaScaleBiasSoftmax"] == found["__cudnn$fmhaScaleBiasSoftmaxBackward"] == 1
    # 8 rows over fsdp 4, two heads over tensor 2: a kernel has two rows and one head.
    assert re.search(r"= \(bf16\[2,1,128,64\].*__cudnn\$fmhaScaleBiasSoftmax\"", text)
    # Weights are dequantized before they are gathered, in the compute dtype.
    gathered = [c for c in collectives(text) if c.kind == "all-gather" and "/layers/" in c.where]
    assert {c.group for c in gathered} == {4}
    assert {dtype for c in gathered for dtype, _ in array_shapes(c.shape)} == {"bf16"}
    # The halves of a packed row go to other devices before they are dequantized.
    exchanged = [c for c in collectives(text) if c.where.endswith("/concatenate")]
    assert {dtype for c in exchanged for dtype, _ in array_shapes(c.shape)} == {"u8"}


def test_micro_batches_with_int8_gather_each_layer_in_each_of_them(tmp_path):
    model = {"quantize": "int8", "remat": "full"}
    settings = llama(tmp_path, model=model, mesh=(1, 4, 1), train={"accumulate": 2})
    text = compiled(settings, tmp_path, "l4:4")
    assert dtypes(text) == {"bf16"}
    gathered = [c for c in collectives(text) if c.kind == "all-gather" and "/layers/" in c.where]
    # Each layer in each of two micro-batches.
    assert {c.times for c in gathered} == {2 * SMALL["num_hidden_layers"]}
    # Reduced are adapters and single numbers, never a weight.
    sizes = [c.bytes for c in collectives(text) if c.kind in ("all-reduce", "reduce-scatter")]
    assert max(sizes) < 128 * 128


# Products with an A for the norms of the weights' columns, whose result has the rank as a side.
NORMS = {"ar,ab->rb", "Zr,Zb->rb"}


def test_dora_computes_only_its_norms_in_float32(tmp_path):
    text = compiled(llama(tmp_path, mesh=(1, 8, 1), lora={"variant": "dora"}), tmp_path, "h100:8")
    assert {where.split("/")[-2] for where in float32_products(text)} == NORMS
    assert any(name.startswith("__cudnn$fmha") for name in calls(text))
    assert {c.kind for c in collectives(text)} >= {"all-gather"}


def test_the_pmap_step(tmp_path):
    lowered, step = lower_pmap(llama(tmp_path), tmp_path, gpus("h100:8"))
    program = lowered.compile()
    check_donated(program, *step.held["trained"], *step.held["optimizer"])
    text = program.as_text()
    assert all("BTNH,BSNH->BNTS" in where for where in float32_products(text))
    assert {c.kind for c in collectives(text)} == {"all-reduce"}
    assert calls(text)["__cudnn$fmhaScaleBiasSoftmax"]


def test_a_population_shares_its_base_without_collectives(tmp_path):
    count = 8
    single = encoder(tmp_path)
    fields = {field.name: getattr(single, field.name) for field in dataclasses.fields(single)}
    run = SweepRun(**fields, sweep=SweepSettings(learning_rates=(1e-4,), lr_ratios=(4.0,)))
    mesh = Mesh(gpus(f"h100:{count}"), (MEMBER_AXIS,))
    step = lower(single, tmp_path, gpus(f"h100:{count}")[:1])
    optimizer = functools.partial(make_optimizer, run.shared_optimizer, steps=10, specs=step.parts.specs)
    rates = {"learning_rate": 1e-4, "lr_ratio": 4.0, "scales": dict.fromkeys(step.parts.specs, 1.0)}

    def first():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), step.parts.trainable)
        return jax.tree.map(jnp.asarray, first_member(zeros, optimizer, **rates, seed=0))

    stack = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((2 * count, *x.shape), x.dtype))
    one = make_member_step(step.run.problem, optimizer, run.train.max_skipped)
    members = jax.eval_shape(first)
    mapped = map_members(one, (0, None, 0), at_once=2, mesh=mesh, donate=0)
    lowered = mapped.lower(stack(members), step.parts.frozen, stack(step.held["batch"][0]))
    program = lowered.compile()
    assert not collectives(program.as_text())
    # Two members a device, donated.
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(members.state.trainable))
    assert program.memory_analysis().alias_size_in_bytes >= 2 * 3 * size


def test_a_minimal_spec_is_a_device_of_the_named_kind():
    for name, gpu in GPUS.items():
        devices = gpus(f"{name}:2x4")
        assert {device.device_kind for device in devices} == {gpu.kind}
        assert [device.process_index for device in devices] == [0] * 4 + [1] * 4
