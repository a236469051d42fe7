"""All families of causal language models, against golden files that transformers made, and in their variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.models.families import family_of

from ..marks import slow
from ..refusals import refusals
from .golden import CASES, IDS, QUICKLY, WIDTH, error, generated, logits, run

BF16 = 0.05
VALUES, GRADIENTS = 5e-6, 2e-5


TELLING = ("gpt2_scaled", "llama_llama3", "llama_gemma2")


@pytest.mark.parametrize("name", [name if name in TELLING else slow(name) for name in CASES])
def test_logits_equal_transformers(name, models):
    golden, model, params = models(name)
    for key in ("right", "left", "long"):
        given = logits(model, params, golden[key], (golden[key] != 0).astype(np.int32))
        # transformers' own float32 is off by 6e-7 to 3e-6.
        assert error(given, golden[f"float64/{key}"]) <= 1e-5, key


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2_scaled", "llama_gemma3", "llama_phi3_long", "llama_olmo3", "llama_smollm3"]
)
def test_continuations_with_a_cache_equal_transformers(name, models):
    golden, model, params = models(name)
    given = generated(model, params, golden["prompts"], golden["greedy"].shape[1])
    np.testing.assert_array_equal(given, golden["greedy"])


@pytest.fixture(scope="module")
def long_inputs():
    """Two rows of 150 tokens, two blocks of queries; in each two sequences, in one with padding on both sides."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 96, (2, 150)).astype(np.int32)
    segments = np.repeat([[0, 1, 2, 0], [1, 1, 2, 2]], [5, 60, 80, 5], axis=1).astype(np.int32)
    return ids, segments


def value_and_gradient(model, params, inputs, attention="auto", **fields):
    """Logits, zero at padding, and the gradient of a function of them for every parameter."""
    model, (ids, segments) = model.clone(attention=attention, **fields), inputs
    weights = jnp.cos(jnp.arange(model.config.vocab_size, dtype=jnp.float32))

    def total(params):
        out = model.apply({"params": params}, ids, segments)
        out = jnp.where(segments[:, :, None] != 0, out, 0)
        return jnp.sum(jnp.tanh(out) * weights[None, None]), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICKLY)(params)
    return np.asarray(out), dict(jax.tree_util.tree_leaves_with_path(gradient))


@pytest.mark.slow
def test_a_variant_has_the_same_values_and_gradients(models):
    golden, *model = models("llama_mistral")
    inputs = golden["left"], (golden["left"] != 0).astype(np.int32)
    variants = {"unroll": True, "remat": "dots", "attention": "blocked"}, {"remat": "full"}
    wanted, wanted_gradient = value_and_gradient(*model, inputs, "xla")
    for fields in variants:
        given, gradient = value_and_gradient(*model, inputs, **fields)
        assert error(given, wanted) <= VALUES, fields
        for path, leaf in wanted_gradient.items():
            assert error(gradient[path], leaf) <= GRADIENTS, (fields, jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama_mistral", "blocked"), ("gpt2_scaled", "xla")],
)
def test_packed_sequences_equal_each_alone(name, attention, models, long_inputs):
    _, model, params = models(name)
    length = min(150, model.config.max_length)
    model, (ids, segments) = model.clone(attention=attention), (x[:, :length] for x in long_inputs)
    rows, numbers = (0, 0, 1, 1), (1, 2, 1, 2)  # all four sequences
    rows, numbers = zip(
        *((r, n) for r, n in zip(rows, numbers, strict=True) if n in segments[r]), strict=True
    )
    packed = np.asarray(run(model, {"params": params}, ids[rows, :], segments[rows, :]))
    own = [segments[row] == number for row, number in zip(rows, numbers, strict=True)]
    alone = np.stack([np.pad(ids[row][m], (0, (~m).sum())) for row, m in zip(rows, own, strict=True)])
    wanted = np.asarray(run(model, {"params": params}, alone, (alone != 0).astype(np.int32)))
    assert np.isfinite(packed).all()
    for i, mask in enumerate(own):
        assert error(packed[i][mask], wanted[i, : mask.sum()]) <= 1e-5


@pytest.mark.slow
def test_values_and_amount_of_padding_change_nothing(models):
    golden, model, params = models("llama_phi3_long")  # whose angles go by the length of a row
    tokens, wanted = golden["right"][:1], golden["float64/right"][:1]
    length = tokens.shape[1]
    for before in (0, 9, WIDTH - length):
        pads = [(0, 0), (before, WIDTH - length - before)]
        ids, segments = np.pad(tokens, pads, constant_values=5), np.pad(np.ones_like(tokens), pads)
        given = logits(model, params, ids, segments)[:, before : before + length]
        assert error(given, wanted) <= 1e-5


@pytest.mark.slow
def test_bf16_runs_near_float32(models):
    golden, model, params = models("llama_llama3")
    low = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(low.init, jax.random.key(0), IDS)["params"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)  # exact: the file's are rounded
    given = run(low, {"params": halved}, golden["long"])
    assert given.dtype == jnp.float32
    assert run(low, {"params": halved}, golden["long"], method="hidden").dtype == jnp.bfloat16
    assert 1e-4 < error(np.asarray(given), golden["float64/long"]) < BF16


MLP = {f"layers/mlp/{name}_proj" for name in ("gate", "up", "down")}
LLAMA = {f"layers/self_attn/{name}_proj" for name in "qkvo"} | MLP
GPT2 = {f"layers/{name}" for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets", "adapted"),
    [
        ("llama_biases", "all-linear", LLAMA | {"lm_head"}),
        ("gpt2_tied", "all-linear", GPT2),
        ("llama_llama3", ("q_proj", "v_proj"), {f"layers/self_attn/{name}_proj" for name in "qv"}),
    ],
)
def test_what_adapters_are_made_for(name, targets, adapted, models):
    wrapped = apply_lora_plus(models(name)[1], LoRAPlusConfig(rank=4, target_modules=targets))
    lora, specs = init_lora(wrapped, jax.random.key(1), IDS)
    assert set(specs) == adapted
    if name == "llama_llama3":  # layers are stacked
        assert jax.tree.map(jnp.shape, lora["layers"]["self_attn"]) == {
            "q_proj": {"lora_a": (2, 32, 4), "lora_b": (2, 4, 32)},
            "v_proj": {"lora_a": (2, 32, 4), "lora_b": (2, 4, 16)},
        }


def test_every_family_is_found_by_its_model_types():
    assert family_of("gpt2").model.__name__ == "GPT2"
    assert family_of("qwen3").model.__name__ == "Llama"


def apply(*inputs):
    return lambda models: models("gpt2_tied")[1].apply({"params": models("gpt2_tied")[2]}, *inputs)


test_inputs_whose_shapes_do_not_fit = refusals(
    (apply(np.zeros(3, np.int32)), "(batch, tokens)", "(3,)"),
    (apply(np.zeros((1, 3), np.int32), np.zeros((1, 2), np.int32)), "segment_ids", "(1, 3)", "(1, 2)"),
)
