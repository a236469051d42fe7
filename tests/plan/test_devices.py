"""Topologies of TPUs and GPUs: shapes, names and files."""

import dataclasses
import os
import re

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from loraplus_jax.data.options import DataOptions
from loraplus_jax.models.attention_common import COMPILED_FOR
from loraplus_jax.models.options import ModelOptions
from loraplus_jax.plan.devices import (
    GPUS,
    TPUS,
    Gpu,
    gpu_spec,
    memory_fraction,
    target_devices,
)
from loraplus_jax.plan.fits import find_fits
from loraplus_jax.plan.plan import make_plan
from loraplus_jax.settings.schema import Settings

from ..messages import assert_mentions, mentions
from ..refusals import refusals


def test_names_are_unique_and_memory_grows():
    assert not GPUS.keys() & TPUS.keys()
    assert len({gpu.kind for gpu in GPUS.values()}) == len(GPUS)
    sizes = [gpu.memory for gpu in GPUS.values()]
    assert sizes == sorted(sizes)


def test_a_spec_names_the_card_its_capability_and_its_memory():
    text = gpu_spec(GPUS["h100"])
    # XLA reads 23 fields of the card; the capability is one with parts.
    card = text.partition("}\nplatform_name")[0]
    assert len(re.findall(r"^  \w+", card, flags=re.M)) == 23
    assert_mentions(
        text, "NVIDIA H100 80GB HBM3", "major: 9 minor: 0 feature_extension", "84900000000", 233472
    )
    assert "feature_extension" not in gpu_spec(GPUS["l4"])
    assert "major: 12 minor: 0" in gpu_spec(GPUS["rtx6000pro"])


PUBLISHED = {
    # Dense bfloat16 TFLOP/s, GB/s of memory and of links in both directions, by NVIDIA's data sheets ("H100 Tensor
    # Core GPU", SXM; "H200", "A100" of 40 and 80 GB, "L4", "DGX B200" by 8) and cloud.google.com/tpu/docs.
    "l4": (242 / 2, 300, 64),
    "a100-40": (312, 1555, 600),
    "a100-80": (312, 2039, 600),
    "h100": (1979 / 2, 3350, 900),
    "h200": (1979 / 2, 4800, 900),
    "b200": (36_000 / 2 / 8, 64_000 / 8, 1800),
    "v5e": (197, 819, 400),
    "v5p": (459, 2765, 1200),
    "v6e": (918, 1638, 800),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rates_of_a_card_are_the_published_ones(name):
    card = GPUS.get(name) or TPUS[name]
    flops, memory, links = PUBLISHED[name]
    rates = card.flops / 1e12, card.memory_rate / 1e9, card.link_rate / 1e9
    assert rates == pytest.approx((flops, memory, links / 2), rel=2e-3)


def test_what_jax_reserves(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    assert GPUS["h100"].available == int(0.75 * 84.9e9)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert memory_fraction() == 0.9
    assert GPUS["h100"].available == int(0.9 * 84.9e9)
    assert TPUS["v5e"].available == 16e9


CARD = dataclasses.asdict(GPUS["l4"]) | {"name": "t4", "kind": "Tesla T4", "capability": 7.5}


def write_card(tmp_path, **changes):
    file = tmp_path / "t4.yaml"
    file.write_text(
        "\n".join(f"{name}: {value}" for name, value in (CARD | changes).items() if value is not None)
    )
    return f"{file}:2"


def targets(topology):
    return lambda: target_devices(topology)


def card(**changes):
    return lambda tmp_path: target_devices(write_card(tmp_path, **changes))


NEAREST = {"v5e:3x3": "v5e:2x4", "v6e:2x3": "v6e:2x4", "v5e:6x6": "v5e:4x8", "v5e:4x2": "v5e:2x4"}
NEAREST |= {"v5p:2x2x3": "v5p:2x2x4", "v5p:8x4x4": "v5p:4x4x8", "v4:1x1x1": "v4:2x2x1"}
test_topologies_that_do_not_exist = refusals(
    *((targets(topology), topology, near) for topology, near in NEAREST.items()),
    (targets("h10:8"), "h100:8", "'h10:8'", "'h100'"),
    (targets("H100:8"), "'h100'"),
    (targets("a100:8"), "'a100-40' or 'a100-80'"),
    (targets("h100"), "h100:COUNT", "'h100'"),
    (targets("h100:-1"), "h100:COUNT", "'h100:-1'"),
    (targets("h100:\uff18"), "h100:COUNT"),  # a full-width digit
    (targets("h100:0"), "h100:COUNT", "'h100:0'"),
    (targets("h100:2x2x2"), "h100:HOSTSxCOUNT"),
    (targets("h100:5000"), "4,096", "'h100:5000'"),
    (targets("nowhere.yaml:8"), "nowhere.yaml", "missing"),
    (card(clock=None), "clock"),
    (card(speed=1), "speed"),
    (card(memory="much"), "memory", "number", "'much'"),
    (card(memory=".inf"), "memory", "inf"),
    (card(name="5090"), "name", "5090", "quotes"),
    (card(cores=0), "cores", "greater than 0"),
    (card(capability=7.0), "capability", "7.5", "7.0"),
)


TOPOLOGY = "jax.experimental.topologies.get_topology_desc"


def test_a_file_of_a_card(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(TOPOLOGY, lambda **options: asked.update(options) or _Two)
    chip, devices = target_devices(write_card(tmp_path, memory="16e9"))  # YAML's text
    assert chip == Gpu(**CARD | {"memory": 16e9})
    assert (asked["topology"], len(devices)) == ("1x1x2", 2)
    assert_mentions(
        asked["target_config"], "Tesla T4", "major: 7 minor: 5", "device_memory_size: 16000000000"
    )


def test_a_process_that_has_planned_may_train(tmp_path, monkeypatch):
    """Platforms, environment and JAX's checks are as before, also after an error."""

    def reject(**_):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: too old")

    def state():
        checks = [getattr(fused, name) for name in ("check_cudnn_version", "check_compute_capability")]
        return jax.config.values["jax_platforms"], dict(os.environ), checks, dict(COMPILED_FOR)

    settings = Settings(model=ModelOptions(path="-"), data=DataOptions(), task="instruction", output_dir="-")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(TOPOLOGY, reject)
    platforms = jax.config.values["jax_platforms"]
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    jax.config.update("jax_platforms", "")  # JAX has its devices already
    try:
        before = state()
        plans = [lambda name=name: make_plan(settings, name) for name in (write_card(tmp_path), "v5e:2x2")]
        for plan in (*plans, lambda: find_fits(settings, print)):
            with pytest.raises(ValueError, match="too old"):
                plan()
            assert state() == before
    finally:
        jax.config.update("jax_platforms", platforms)


class _Two:
    devices = jax.devices()[:2]


@pytest.mark.parametrize("fraction", ["much", "75", "0", "nan"])
@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_an_invalid_fraction_of_memory_is_found_before_the_compiler_reads_it(monkeypatch, name, fraction):
    monkeypatch.setenv(name, fraction)
    with pytest.raises(ValueError, match=mentions(name, repr(fraction), "0.9")):
        target_devices("h100:8")


@pytest.mark.parametrize("at", ["loraplus_jax.plan.devices._compile_exp", TOPOLOGY])
def test_what_the_compiler_cannot_read_or_compile_for_is_one_line(tmp_path, monkeypatch, at):
    def reject(*_, **__):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: ptxas\ntoo old.")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(TOPOLOGY, lambda **options: _Two)
    monkeypatch.setattr(at, reject)
    with pytest.raises(ValueError, match=mentions("t4.yaml:2", "jax_cuda13_plugin", "ptxas too old")):
        target_devices(write_card(tmp_path))
