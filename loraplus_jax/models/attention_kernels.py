"""Attention kernels from libraries: splash attention on TPUs, cuDNN's attention on NVIDIA GPUs.

GSPMD cannot partition a kernel, so on a mesh each device runs it on its own rows and heads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType, PartitionSpec

from ..step.sharding import mesh_axes_of_rows
from .attention_common import ATTENTION_NAMES, target_capability, token_mask

# Tokens per block of splash attention, multiples of a TPU's 128 lanes: the largest that divides the length.
# Smaller blocks skip more of what causality masks, but read keys and values more often: blocks of 512 take 512
# FLOPs per byte that they read, and a v5e can do 240 in the same time.
BLOCKS = (512, 384, 256, 128)
# Up to this many blocks, one kernel computes all gradients. It scores each block once, not twice, but keeps one
# partial gradient of the queries per block of keys, so its memory grows with the square of the length.
MAX_FUSED_BLOCKS = 4

_ONE_WINDOW = "the same window in every layer, but this model's differ between layers"


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int | jax.Array | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention by `jax.experimental.pallas.ops.tpu.splash_attention`; see `causal_attention`.

    The scale multiplies the queries in their own dtype. `interpret` runs the kernel on any platform, slowly.

    Raises:
      ValueError: the window is an array.
    """
    if isinstance(window, jax.Array):
        raise ValueError(f"attention splash needs {_ONE_WINDOW}; use auto, xla or blocked")
    heads, length = query.shape[2], query.shape[1]
    # Causality hides padding at the end from all real queries, whatever its segment.
    extra = -length % BLOCKS[-1]
    shape = (length + extra, length + extra)
    block = next(size for size in BLOCKS if shape[0] % size == 0)
    fused = shape[0] <= MAX_FUSED_BLOCKS * block
    mask = splash_mask.CausalMask(shape)
    if window is not None and window < length:
        mask = splash_mask.LocalMask(shape, (window - 1, 0), 0)
        # The fused kernel would compute what is outside a window, too.
        fused = False
    attend: Any = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=None if fused else block,
            block_kv_dq=None if fused else block,
            use_fused_bwd_kernel=fused,
        ),
        attn_logits_soft_cap=softcap,
        # `map_over_mesh` has split the heads already.
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_NAMES[0],
        interpret=interpret,
    )
    # The kernel takes the scale with its queries, and heads before tokens.
    q, k, v = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, extra), (0, 0)))
        for x in (query * jnp.asarray(scale, query.dtype), key, value)
    )
    segments = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (0, extra)))
        segments = splash.SegmentIds(ids, ids)
    # The kernel knows no batch: it takes one sequence.
    return jax.vmap(attend)(q, k, v, segments)[:, :, :length].transpose(0, 2, 1, 3)


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int | jax.Array | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Causal attention by `jax.nn.dot_product_attention(implementation="cudnn")`; see `causal_attention`.

    cuDNN knows no segments, so these become a mask, one value per pair of tokens, for all heads together.

    Raises:
      ValueError: cuDNN's kernel does not support these inputs.
    """
    if (problem := cudnn_problem(query, window, softcap)) is not None:
        raise ValueError(f"attention cudnn needs {problem}; use auto, xla or blocked")
    # A window beside a mask is part of the mask, as cuDNN takes no sliding window beside a bias.
    mask = None if segment_ids is None else token_mask(segment_ids, query.shape[1], window)[:, None]
    near: Any = None if window is None or mask is not None else (window - 1, 0)
    options: Any = {"scale": scale, "is_causal": True, "local_window_size": near, "implementation": "cudnn"}
    y = jax.nn.dot_product_attention(query, key, value, mask=mask, **options)
    return checkpoint_name(y, ATTENTION_NAMES[0])


def cudnn_problem(query: jax.Array, window: int | jax.Array | None, softcap: float | None) -> str | None:
    """What cuDNN's kernel needs and these inputs do not have, as jax 0.10 checks it; None if it supports them."""
    length, size = query.shape[1], query.shape[3]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, got {query.dtype}"
    if size > 128 or size % 8:
        return f"a head size that is a multiple of 8 and at most 128, got {size}"
    if length % 2:
        return f"an even number of tokens, got {length}"
    if softcap is not None:
        return f"scores without a soft cap, got {softcap}"
    return None if window is None or isinstance(window, int) else _ONE_WINDOW


def has_cudnn() -> bool:
    """Whether the program being traced is for GPUs with cuDNN's kernel: of compute capability 8.0 or more."""
    return target_capability() >= 8


KERNELS: dict[str, Callable[..., jax.Array]] = {"splash": splash_attention, "cudnn": cudnn_attention}


def choose_kernel(
    platform: str, query: jax.Array, window: int | jax.Array | None, softcap: float | None
) -> dict[str, str]:
    """The kernel to prefer on a platform for these inputs, by the platform's name; empty if there is none."""
    if platform == "tpu" and not isinstance(window, jax.Array):
        return {"tpu": "splash"}
    if platform == "gpu" and cudnn_problem(query, window, softcap) is None and has_cudnn():
        return {"cuda": "cudnn"}
    return {}


def map_over_mesh(
    kernel: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Runs a kernel (query, key, value, segment_ids) on each device's rows and heads, if there is a mesh.

    An axis that does not divide the rows or the key heads does not split them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Under pmap and inside shard_map, axes are Manual.
    axes = {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not axes:
        return kernel(query, key, value, segment_ids)
    rows = mesh_axes_of_rows()
    if query.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        rows = ()
    heads = "tensor" if "tensor" in axes and key.shape[2] % mesh.shape["tensor"] == 0 else None
    states = PartitionSpec(rows, None, heads)
    segments = None if segment_ids is None else PartitionSpec(rows)
    mapped = jax.shard_map(
        kernel,
        in_specs=(states, states, states, segments),
        out_specs=states,
        axis_names=axes,
        # Pallas does not say over which axes its outputs vary.
        check_vma=False,
    )
    return mapped(query, key, value, segment_ids)
