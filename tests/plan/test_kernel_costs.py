# ruff: noqa: E501  XLA writes long lines
"""FLOPs and bytes of kernels, from programs' text: by hand, and by the pairs of tokens that a mask leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.models.attention import causal_attention
from loraplus_jax.plan.devices import target_devices
from loraplus_jax.plan.kernel_costs import kernel_work

TEXT = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (q: bf16[2,4,1024,128], k: bf16[2,2,1024,128]) -> bf16[2,4,1024,128] {
  %q = bf16[2,4,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,2,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %splash_mha_fwd_residuals.1 = (f32[2,512,128]{2,1,0:T(8,128)}, f32[2,512,128]{2,1,0:T(8,128)}, f32[2,512,128]{2,1,0:T(8,128)}, bf16[2,4,1024,128]{3,2,1,0}, f32[2,4,1024,128]{3,2,1,0}) custom-call(%a, %b, %q, %k, %k, %i), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, s8[1,2,2]{2,1,0}, bf16[2,4,1024,128]{3,2,1,0}, bf16[2,2,1024,128]{3,2,1,0}, bf16[2,2,1024,128]{3,2,1,0}, s32[1024,128]{1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="pallas_call"}
  %other = bf16[8]{0} custom-call(%q), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8]{0}}
  ROOT %sort = bf16[8]{0} custom-call(%q), custom_call_target="TopK"
}
"""


def test_work_by_hand():
    work = kernel_work(TEXT)
    # Of four blocks of 512 x 512, causality leaves three; two matmuls, two rows of four heads.
    assert work.flops == 2 * 2 * 512 * 512 * 128 * 3 * 2 * 4
    # The first block of keys and of values is read by every query head for both its rows of blocks, the second by
    # one; XLA counts both blocks of both key heads once.
    assert work.bytes == 2 * 2 * 512 * 128 * (3 * 2 * 4 - 2 * 2 * 2)
    assert (work.unknown, work.workspace) == (1, 0)


CUDNN = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (q: bf16[8,4,256,64]) -> bf16[8,4,256,64] {{
  %fwd.1 = (bf16[8,4,256,64]{{3,1,2,0}}, f32[8,4,256]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={{bf16[8,256,4,64]{{3,2,1,0}}, bf16[8,256,2,64]{{3,2,1,0}}, bf16[8,256,2,64]{{3,2,1,0}}}}, api_version=API_VERSION_STATUS_RETURNING, backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{mask}", "sliding_window_length": {window}}}}}
  %bwd.1 = (bf16[8,4,256,64]{{3,1,2,0}}, bf16[8,2,256,64]{{3,1,2,0}}, bf16[8,2,256,64]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k, %s, %o, %g), custom_call_target="__cudnn$fmhaSoftmaxBackward", operand_layout_constraints={{bf16[8,256,4,64]{{3,2,1,0}}, bf16[8,256,2,64]{{3,2,1,0}}, bf16[8,256,2,64]{{3,2,1,0}}, f32[8,4,256]{{2,1,0}}}}, api_version=API_VERSION_STATUS_RETURNING, backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{mask}", "sliding_window_length": {window}}}}}
}}
"""


@pytest.mark.parametrize(
    ("mask", "window", "pairs"),
    [
        ("CAUSAL", 0, 256 * 257 // 2),
        ("CAUSAL", 100, 100 * 101 // 2 + 156 * 100),
        ("NO_MASK", 0, 256 * 256),
    ],
)
def test_work_of_cudnn_by_hand(mask, window, pairs):
    work = kernel_work(CUDNN.format(mask=mask, window=window))
    # Two matmuls forward and five backward, over 8 rows of 4 heads of 64.
    assert work.flops == 2 * (2 + 5) * 8 * 4 * 64 * pairs
    assert work.workspace == 4 * 8 * 4 * 256 * 64 + 4 * 8 * 4 * 256
    assert (work.bytes, work.unknown) == (0, 0)


GRADIENT = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (q: bf16[2,4,1024,64]) -> bf16[2,4,1024,64] {{
  %{name}.1 = ({outputs}) custom-call(%a, %b, %q, %k, %k, /*index=5*/%l, %g, %d, %i), custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,2,2]{{2,1,0}}, s8[1,2,2]{{2,1,0}}, bf16[2,4,1024,64]{{3,2,1,0}}, bf16[2,2,1024,64]{{3,2,1,0}}, bf16[2,2,1024,64]{{3,2,1,0}}, f32[2,4,1,1024]{{3,2,1,0}}, bf16[2,4,1024,64]{{3,2,1,0}}, f32[2,4,1,1024]{{3,2,1,0}}, s32[1024,128]{{1,0}}}}, frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{}}"
}}}}, metadata={{op_name="pallas_call"}}
}}
"""
BLOCK, KEYS = "f32[2,512,64]{2,1,0:T(8,128)}", "bf16[2,2,1024,64]{3,2,1,0}"


@pytest.mark.parametrize(
    ("name", "outputs", "matmuls", "operand"),
    [
        # Gradients of the queries alone; of keys and values; of all three in one kernel.
        ("splash_mha_dq_no_residuals", (BLOCK, "bf16[2,4,1024,64]{3,2,1,0}"), 3, 2),
        ("splash_mha_dkv_no_residuals", (BLOCK, BLOCK, KEYS, KEYS), 4, 4),
        ("splash_mha_dkv_no_residuals", (BLOCK, BLOCK, "bf16[2,2,4,1024,64]{4,3,2,1,0}", KEYS, KEYS), 5, 4),
    ],
)
def test_work_of_gradients_by_hand(name, outputs, matmuls, operand):
    work = kernel_work(GRADIENT.format(name=name, outputs=", ".join(outputs)))
    # Two rows of four heads visit three of the four blocks.
    assert work.flops == 2 * matmuls * 512 * 512 * 64 * 3 * 2 * 4
    # Each visit reads two blocks; XLA counts two operands of two rows and as many heads as they have once.
    assert work.bytes == 2 * 2 * (3 * 2 * 4 * 512 * 64 - 2 * operand * 1024 * 64)
    assert work.unknown == 0


def blocks_left(length, block, window):
    """Blocks of the matrix of scores in which any pair of tokens is left."""
    index = np.arange(length)
    distance = index[:, None] - index[None]
    left = (distance >= 0) & (distance < (window or length))
    return left.reshape(length // block, block, -1, block).any((1, 3)).sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "window", "block", "matmuls"),
    [
        (1024, None, 512, 2 + 5),  # one kernel for all gradients
        (1152, 386, 384, 2 + 3 + 4),
        (1408, None, 128, 2 + 3 + 4),  # eleven blocks
    ],
)
def test_flops_by_the_pairs_of_tokens_that_the_mask_leaves(length, window, block, matmuls):
    pytest.importorskip("libtpu", reason="pip install 'loraplus_jax[tpu-plan]'")
    _, (device,) = target_devices("v5e:1x1")
    place = jax.sharding.SingleDeviceSharding(device)
    attend = functools.partial(causal_attention, window=window, implementation="splash")

    def total(*states):
        return jnp.sum(jnp.square(attend(*states).astype(jnp.float32)))

    states = [jax.ShapeDtypeStruct((2, length, n, 64), jnp.bfloat16, sharding=place) for n in (4, 2, 2)]
    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(*states).compile()
    work = kernel_work(program.as_text())
    assert work.flops == 2 * matmuls * blocks_left(length, block, window) * block**2 * 64 * 2 * 4
    # What this test is for: the compiler counts next to none of it.
    assert program.cost_analysis()["flops"] < 0.05 * work.flops
