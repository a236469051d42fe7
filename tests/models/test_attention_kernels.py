"""Attention kernels: splash in Pallas's interpreter against float64, and which programs hold a kernel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from loraplus_jax.models import attention_kernels
from loraplus_jax.models.attention import MIN_KERNEL_LENGTH, causal_attention
from loraplus_jax.models.attention_kernels import splash_attention
from loraplus_jax.models.decoder import _POLICIES

from ..refusals import refusals
from .test_attention import HEADS, KEY_HEADS, SIZE, check, inputs, reference, segments_of


def value_and_gradients(query, key, value, upstream, segments=None, window=None, scale=SIZE**-0.5, cap=None):
    def total(query, key, value):
        options = {"window": window, "scale": scale, "softcap": cap, "interpret": True}
        out = splash_attention(query, key, value, segments, **options)
        return jnp.sum(out.astype(jnp.float32) * upstream), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value)
    return out, *gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "with_segments", "options"),
    [
        (130, True, {"window": 40, "scale": 0.8, "cap": 0.7}),
        (130, False, {"key_heads": 1}),
        (128, False, {"window": 1}),
        (700, True, {"window": 300}),  # several blocks, two kernels for the gradients
        (600, True, {}),  # five blocks: two kernels without a window
    ],
)
def test_splash_equals_float64(length, with_segments, options):
    options, segments = dict(options), segments_of(length) if with_segments else None
    data = inputs(length, key_heads=options.pop("key_heads", KEY_HEADS))
    check(value_and_gradients(*data, segments, **options), reference(*data, segments, **options))


@pytest.mark.slow
def test_splash_in_bfloat16():
    data, segments = inputs(300, jnp.bfloat16), segments_of(300)
    found = value_and_gradients(*data, segments)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    for ours, wanted in zip(found, reference(*data, segments), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_splash_of_several_members_at_once():
    first, second = inputs(130), [x[::-1] for x in inputs(130)]
    together = [jnp.stack(pair) for pair in zip(first, second, strict=True)]
    found = jax.vmap(lambda *data: value_and_gradients(*data, segments_of(130)))(*together)
    for member, data in enumerate((first, second)):
        check([x[member] for x in found], reference(*data, segments_of(130)))


def shapes(length=MIN_KERNEL_LENGTH, dtype=jnp.bfloat16, size=SIZE, rows=2):
    states = [jax.ShapeDtypeStruct((rows, length, n, size), dtype) for n in (HEADS, KEY_HEADS, KEY_HEADS)]
    return *states, jax.ShapeDtypeStruct((rows, length), jnp.int32)


def lower(function, platform, *arguments, **axes):
    """The program for a platform that this machine does not have, on a mesh of such devices."""
    device = AbstractDevice(device_kind="", num_cores=1, platform="gpu" if platform == "cuda" else platform)
    sizes = axes or {"data": 1}
    kinds = (AxisType.Auto,) * len(sizes)  # what jax 0.10 takes by default, and 0.12 no longer
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels_in(program):
    return re.findall(r"tpu_custom_call|__cudnn\$fmha\w+", program)


@pytest.fixture
def nvidia(monkeypatch):
    """As on a machine with an NVIDIA GPU and cuDNN 9.10."""
    monkeypatch.setattr(attention_kernels, "has_cudnn", lambda: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


SPLASH, CUDNN = ["tpu_custom_call"], ["__cudnn$fmhaScaleBiasSoftmax"]


@pytest.mark.parametrize(
    ("platform", "arguments", "options", "kernels"),
    [
        ("tpu", shapes(), {}, SPLASH),
        ("tpu", shapes(dtype=jnp.float32), {"window": 16, "softcap": 3.0}, SPLASH),
        ("tpu", shapes(MIN_KERNEL_LENGTH - 1), {}, []),
        ("tpu", shapes(), {"window": np.array(16)}, []),
        ("cpu", shapes(512), {}, []),
        ("cuda", shapes(), {}, CUDNN),
        ("cuda", (*shapes()[:3], None), {"window": 16}, ["__cudnn$fmhaSoftmax"]),
        ("cuda", shapes(MIN_KERNEL_LENGTH + 1), {}, []),
        ("cuda", shapes(dtype=jnp.float32), {}, []),
        ("cuda", shapes(size=12), {}, []),
        ("cuda", shapes(size=256), {}, []),
        ("cuda", shapes(), {"softcap": 3.0}, []),
        ("cuda", shapes(), {"window": np.array(16)}, []),
    ],
)
def test_auto_uses_the_kernel_of_the_platform_that_supports_the_inputs(
    platform, arguments, options, kernels, nvidia
):
    def attend(*given):
        window = options.get("window")
        window = jnp.asarray(window) if isinstance(window, np.ndarray) else window
        return causal_attention(*given, **options | {"window": window})

    assert kernels_in(lower(attend, platform, *arguments)) == kernels


def test_auto_uses_no_kernel_where_it_cannot_know_how_the_computation_is_split(monkeypatch):
    def kernels_for(platform):
        program = jax.jit(lambda *given: causal_attention(*given)).trace(*shapes())
        return kernels_in(program.lower(lowering_platforms=(platform,)).as_text())

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert not kernels_for("tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert kernels_for("tpu") == SPLASH
    assert not kernels_for("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "forward_passes"), [("dots", 1), ("full", 2)])
def test_dots_keeps_what_the_kernel_returns_and_full_computes_it_again(remat, forward_passes):
    @functools.partial(jax.checkpoint, policy=_POLICIES[remat], prevent_cse=False)
    def layer(x, _):
        return causal_attention(x, x, x), None

    def loss(x):
        return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0])

    program = lower(jax.grad(loss), "tpu", shapes(dtype=jnp.float32)[0])
    assert len(re.findall(r'kernel_name = "splash_mha_fwd', program)) == forward_passes


@pytest.mark.parametrize(
    ("axes", "rows", "heads"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2, HEADS // 2),
        ({"data": 3, "fsdp": 2, "tensor": 1}, 8, HEADS),  # six parts do not divide the rows,
        ({"data": 1, "fsdp": 4, "tensor": 4}, 2, HEADS),  # nor four parts the key heads
    ],
)
def test_a_device_of_a_mesh_runs_the_kernel_on_its_rows_and_heads(axes, rows, heads):
    program = lower(causal_attention, "tpu", *shapes(rows=8), **axes)
    (found,) = re.findall(r"tpu_custom_call.*?: \((.*?)\) ->", program)
    assert f"tensor<{rows}x{heads}x{MIN_KERNEL_LENGTH}x{SIZE}xbf16>" in found


def attend(implementation, arguments=None, **options):
    call = functools.partial(causal_attention, implementation=implementation, **options)
    return lambda: jax.eval_shape(call, *(arguments or shapes()))


test_inputs_that_a_kernel_does_not_support = pytest.mark.slow(
    refusals(
        (attend("splash", window=jnp.array(3)), "splash", "window", "auto", "blocked"),
        (attend("cudnn", window=jnp.array(3)), "cudnn", "window", "auto", "blocked"),
        (attend("cudnn", shapes(dtype=jnp.float32)), "cudnn", "bfloat16", "float16", "float32"),
        (attend("cudnn", shapes(size=12)), "cudnn", "multiple of 8", "128", "12"),
        (attend("cudnn", shapes(129)), "cudnn", "even", "129"),
        (attend("cudnn", softcap=2.0), "cudnn", "soft cap", "2.0"),
    )
)
