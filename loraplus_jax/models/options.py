"""Options of the pretrained model."""

from typing import Literal

from pydantic.dataclasses import dataclass

from .._utils.field_types import SECTION, Count, Share, Switch, Text
from .choices import Attention, Quantize, Remat

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ModelOptions:
    """The pretrained model: an encoder for classification and regression, a causal language model otherwise.

    Attributes:
      path: Hugging Face directory or GGUF file, name listed by `loraplus fetch`, or Hub id, tried in this order.
      pooling: pooling of an encoder's hidden states: mean, cls (first token) or pooler (the model's own).
      dtype: compute dtype.
      param_dtype: dtype of the frozen weights; trained parameters stay float32.
      quantize: format in which the frozen weights stay packed: none; nf4, 4.13 bits; int8, 8 bits; file, the blocks
        of a GGUF file as they are. Layers see them in param_dtype.
      quantize_exclude: names of modules whose weights stay as they are; null stands for embeddings, heads and
        poolers.
      split_fused: load fused projections as their parts (language models): GPT-2's c_attn as q_attn, k_attn and
        v_attn; Phi-3's qkv_proj as q_proj, k_proj and v_proj, and gate_up_proj as gate_proj and up_proj.
      dropout: hidden and attention dropout rate of an encoder; null keeps the rates of its config.
      head_dropout: dropout rate before an encoder's new head.
      unroll: unroll the loop over the layers; slower to compile. null unrolls only encoders on CPUs that are not
        quantized, whose steps are then faster.
      remat: activation checkpointing (language models): none; dots keeps only large matmul outputs; full keeps only
        layer inputs. Both save memory; full costs more time.
      attention: attention implementation (language models): xla; blocked, which uses less memory and is faster on a
        CPU from 64 tokens; splash, a kernel for TPUs; cudnn, a kernel for NVIDIA GPUs; auto, which uses the
        device's kernel from 128 tokens if it supports the model, otherwise blocked from 64 tokens.
      loss_chunk: compute the loss this many tokens at a time, so that full logits are never stored (language models
        with a frozen head).
    """

    path: Text
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    quantize: Quantize = "none"
    quantize_exclude: tuple[Text, ...] | None = None
    split_fused: Switch = False
    dropout: Share | None = None
    head_dropout: Share = 0.1
    unroll: Switch | None = None
    remat: Remat = "none"
    attention: Attention = "auto"
    loss_chunk: Count = 512
