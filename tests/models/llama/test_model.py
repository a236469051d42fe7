"""What the compiled step of a Llama costs, and a real model; for the other values see `test_decoder.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, init_state, jit_step, lora_plus_adamw
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama
from loraplus_jax.tasks.causal_lm import LanguageTask

from ..golden import GOLDEN, error, generated, load, real_smollm2

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 512,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SIZES |= {"intermediate_size": 256, "max_position_embeddings": 64, "tie_word_embeddings": True}
RANK, BATCH, TOKENS = 4, 4, 32
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")


def lowered(layers, *, chunk=10**9, vocab_size=512, **options):
    """A LoRA+ step on a batch of random tokens."""
    net = Llama(LlamaConfig(num_hidden_layers=layers, **(SIZES | {"vocab_size": vocab_size})), **options)
    model = apply_lora_plus(net, LoRAPlusConfig(target_modules=ADAPTED, rank=RANK))
    ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), ids)["params"]
    lora, specs = init_lora(model, jax.random.key(1), ids)
    tx = lora_plus_adamw(1e-3, lr_ratio=4.0, specs=specs)
    shape = (BATCH, TOKENS)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("input_ids", "segment_ids")}
    batch |= {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.float32), "weight": jnp.ones(BATCH)}
    step = jit_step(LanguageTask(kind="instruction").loss_fn(model, chunk=chunk), tx)
    return step.lower(init_state({"lora": lora}, tx, jax.random.key(0)), {"params": params}, batch)


def ideal_flops(layers):
    """What a step cannot do without, a multiplication and an addition counted as two.

    4 for each token and weight: forward, and backward to the input. 6 for each token and adapter weight, which has
    a gradient of its own. 12 for each pair of tokens and feature of a query: scores and values, there and back.
    """
    width, inner, head = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
    query, key = (SIZES[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    adapted = [(width, query), (width, key), (width, key), (query, width)]
    weights = sum(a * b for a, b in adapted) + 3 * width * inner
    factors = RANK * sum(a + b for a, b in adapted)
    layer = (4 * weights + 6 * factors) * BATCH * TOKENS + 12 * BATCH * TOKENS**2 * query
    return layers * layer + 4 * width * SIZES["vocab_size"] * BATCH * TOKENS


def test_a_step_does_hardly_more_than_its_products():
    compiled = lowered(2, unroll=True).compile()
    # Softmax, norms and rotations weigh more here than in a real model.
    assert 0.97 < compiled.cost_analysis()["flops"] / ideal_flops(2) < 1.15


def test_the_program_does_not_grow_with_the_depth():
    small, large, straight = (
        len(lowered(layers, remat="dots", unroll=unroll).as_text().splitlines())
        for layers, unroll in ((2, False), (5, False), (5, True))
    )
    assert large == small
    assert straight > large


def test_remat_takes_less_memory_and_no_chunk_holds_the_logits():
    whole, chunked, kept = (
        lowered(4, chunk=chunk, remat=remat, vocab_size=8192).compile().memory_analysis().temp_size_in_bytes
        for chunk, remat in ((10**9, "full"), (8, "full"), (8, "dots"))
    )
    assert whole > BATCH * TOKENS * 8192 * 4 > chunked
    assert chunked < 0.8 * kept


def test_smollm2_equals_transformers():
    with np.load(GOLDEN / "smollm2.npz") as file:
        golden = dict(file)
    model, params = load(real_smollm2())
    apply = jax.jit(lambda params, *given: model.apply({"params": params}, *given)[:, ::4, golden["entries"]])
    logits = np.where(golden["mask"][:, ::4, None], apply(params, golden["ids"], golden["mask"]), 0)
    assert error(logits, golden["logits"]) <= 1e-4
    given = generated(model, params, golden["ids"], golden["greedy"].shape[1], golden["mask"])
    np.testing.assert_array_equal(given, golden["greedy"])
