"""What a plan says: advice that can be followed, the exchange, the roofline."""

import dataclasses
import re

import jax
import pytest

from loraplus_jax import make_mesh
from loraplus_jax.plan.devices import GPUS, TPUS
from loraplus_jax.plan.hlo import Collective
from loraplus_jax.plan.plan import Work, roofline
from loraplus_jax.plan.render import advice, format_plan
from loraplus_jax.settings.schema import MeshSettings
from loraplus_jax.training.setup import check_mesh

from ..messages import assert_mentions, mentions
from .tiny import fake, llama, plan_by_hand


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan by hand, as no compiler is asked here, and its settings."""
    settings = llama(tmp_path_factory.mktemp("model"))
    return plan_by_hand(settings.model.path), settings


def test_what_does_not_fit_comes_with_what_to_change(planned):
    plan, settings = planned
    large = {**plan.memory, "frozen weights": 8_000_000_000}
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    big = fake(plan, memory=large, needed=9_000_000_000, room=4_000_000_000, mesh=mesh)
    assert not big.fits
    assert re.search(mentions("does not fit", "5.00 GB"), format_plan(big, settings))
    first, second, *_ = advice(big, settings)
    assert first.startswith("mesh.data 1 and mesh.fsdp 8")
    assert_mentions(first, "frozen weights", "8.00 GB", "1.00 GB")
    assert second.startswith("model.param_dtype bfloat16")
    assert_mentions(second, "frozen weights", "4.00 GB")
    hot = fake(
        plan, memory={**plan.memory, "temporaries": 9_000_000_000}, rows=32, needed=9_000_000_000, room=1
    )
    assert advice(hot, settings)[0].startswith("model.remat full")
    assert advice(hot, settings)[1].startswith("train.accumulate 4")
    assert_mentions(advice(hot, settings)[1], "1 row")
    rejected = fake(plan, problem="RESOURCE_EXHAUSTED: Used 20G of 15G", needed=20 * 2**30)
    assert "RESOURCE_EXHAUSTED" in format_plan(rejected, settings)


@pytest.mark.parametrize(
    ("mesh", "times", "said"),
    [
        ((2, 8, 1), 10, "mesh.data 4 and mesh.fsdp 4"),
        ((1, 9, 1), 10, "mesh.data 3 and mesh.fsdp 3"),  # fewer parts that divide the devices
        ((2, 8, 1), 9, None),
        ((2, 4, 2), 10, None),
    ],
    ids=str,
)
def test_weights_in_all_reduces_are_reported(planned, mesh, times, said):
    plan, settings = planned
    reduces = (Collective("all-reduce", 4 * plan.trained, 8, times, "f32[1]", ""),)
    mesh = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    text = format_plan(fake(plan, mesh=mesh, collectives=reduces), settings)
    assert said in text if said else "fewer shards" not in text


@pytest.mark.parametrize(
    ("kinds", "accumulate", "said"),
    [
        ({"all-gather": 6}, 1, "4.50 x"),  # three quarters of it, six times
        ({"all-gather": 6}, 2, "2.25 x"),
        ({"all-gather": 2, "collective-permute": 1, "all-to-all": 9}, 1, "2.50 x"),
        ({"all-gather": 2, "collective-permute": 1, "all-reduce": 20}, 1, "32.50 x"),  # slivers of weights
    ],
)
def test_how_often_split_weights_come_in_by_hand(planned, kinds, accumulate, said):
    plan, settings = planned
    weights = 4 * (plan.total - plan.trained)
    found = [Collective(kind, weights, 4, times, "f32[1]", "") for kind, times in kinds.items()]
    if "all-reduce" not in kinds:  # the gradients are no weights
        found.append(Collective("all-reduce", 4 * plan.trained, 4, 9, "f32[1]", ""))
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    split = fake(plan, mesh=mesh, collectives=found, accumulate=accumulate)
    assert f"{said} the frozen weights" in format_plan(split, settings)
    assert "x the frozen weights" not in format_plan(plan, settings)


def test_a_roofline_by_hand(planned):
    plan, settings = planned
    found = roofline(
        TPUS["v5e"], Work(394e12, 819e9), [Collective("all-gather", 100_000_000_000, 4, 4, "", "")]
    )
    assert found == {"compute": 2.0, "memory": 1.0, "network": 1.5}
    # Two devices of two hosts, four of one.
    between, within = (
        Collective("all-gather", 100, 2, 1, "", "", 2),
        Collective("all-reduce", 100, 4, 1, "", ""),
    )
    gpus = roofline(GPUS["h100"], Work(0, 0), [between, within])
    assert gpus["network"] == pytest.approx(50 / 50e9 + 150 / 450e9)
    assert_mentions(format_plan(fake(plan, collectives=(between, within)), settings), "2 on 2 hosts")
    text = format_plan(fake(plan, roofline=found), settings)
    assert_mentions(text, "roofline", "2.000 s", "128 tokens/s", "FLOPs")
    cut = plan.work._replace(loops=3)
    assert "3 loops" in format_plan(fake(plan, work=cut), settings)
    assert "not counted" in format_plan(fake(plan, work=None), settings)


def test_a_gpu_that_is_too_small_comes_with_what_would_fit(planned, monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    plan, settings = planned
    l4 = GPUS["l4"]
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    memory = {**plan.memory, "frozen weights": 16_000_000_000}
    known = {
        "chip": l4,
        "room": l4.available,
        "mesh": mesh,
        "devices": 1,
        "memory": memory,
        "evaluation": None,
    }
    above = fake(plan, needed=20_000_000_000, **known)
    assert not above.fits
    first, *_, cards, larger = advice(above, settings)
    assert first.startswith("XLA_CLIENT_MEM_FRACTION=0.92")
    assert_mentions(cards, "2 GPUs", "mesh.fsdp 2", "8.00 GB")
    assert larger == "a larger GPU: a100-40, a6000, h100, a100-80, rtx6000pro, h200, b200, gb200"
    assert any("model.quantize nf4" in line and "32" in line for line in advice(above, settings))
    far = advice(fake(plan, needed=30_000_000_000, **known), settings)
    assert not far[0].startswith("XLA")
    assert_mentions(far[-2], "8 GPUs", "mesh.fsdp 8", "2.00 GB")
    assert far[-1].startswith("a larger GPU: a100-40")
    text = format_plan(fake(plan, needed=9_000_000_000, **known), settings)
    assert_mentions(text, "75 % of the GPU's", "17.62 GB", "21.62 GB", "NCCL")
    assert "JAX reserves" not in format_plan(plan, settings)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 1, 1), (2, 4, 1), (1, 4, 2)], ids=str)
def test_advice_is_what_training_would_take(planned, mesh):
    plan, settings = planned
    mesh = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    count = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    tight = fake(plan, mesh=mesh, devices=count, needed=9, room=1, evaluation=None)
    lines = [
        dict(re.findall(r"(mesh\.\w+|train\.accumulate) (\d+)", line)) for line in advice(tight, settings)
    ]
    assert [line for line in lines if line]
    for line in lines:
        axes = mesh | {name.removeprefix("mesh."): int(n) for name, n in line.items() if "mesh" in name}
        train = dataclasses.replace(settings.train, accumulate=int(line.get("train.accumulate", 1)))
        made = make_mesh(**axes, devices=jax.devices()[:count])
        check_mesh(dataclasses.replace(settings, train=train, mesh=MeshSettings(**axes)), made)
