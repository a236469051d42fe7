"""The Llama family against golden files that transformers made, see tests/golden/make_llama.py."""

import dataclasses
import itertools
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge
from loraplus_jax.data.fetch import cache_dir
from loraplus_jax.models.checkpoints.gguf.header import read as read_gguf
from loraplus_jax.models.checkpoints.gguf.load import GgufWeights, to_hf_name
from loraplus_jax.models.checkpoints.hf import load_config, load_params
from loraplus_jax.models.decoding.generate import Sampling, make_generate
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama, name_table

from ..checkpoints.gguf.files import write

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = (
    *("llama2", "llama3", "linear", "dynamic", "yarn", "biases", "smollm2"),
    *("mistral", "mistral_full", "qwen2", "qwen2_tied", "qwen3"),
    *("gemma2", "gemma3", "phi3", "phi3_long"),
)
BF16 = 0.05
VALUES, GRADIENTS = 5e-6, 2e-5
IDS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
# Every input is padded to one shape, so that each model compiles once, and more padding than the file's is tested.
ROWS, WIDTH = 3, 40
# Most of the time goes into compiling; the slow tests and test_llama_live.py do it in full.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def golden_model(name, folder, **fields):
    """The golden file, and the model and parameters as loaded from a directory that holds its weights."""
    golden = np.load(GOLDEN / f"llama_{name}.npz")
    weights = {key.removeprefix("weights/"): golden[key] for key in golden if key.startswith("weights/")}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(golden["config"]))
    model = Llama(LlamaConfig.from_hf(load_config(folder)), **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    return golden, model, load_params(folder, name_table(model.config), shapes)


@partial(jax.jit, static_argnums=0, static_argnames="method", compiler_options=QUICKLY)
def run(model, variables, *inputs, method=None):
    """Compiled once for each model and shape, over all tests."""
    return model.apply(variables, *inputs, method=method)


def logits(model, params, ids, segments):
    """Logits (B, T, V) as float32 NumPy, zero at padding."""
    room = [(0, ROWS - len(ids)), (0, WIDTH - ids.shape[1])]
    out = run(model, {"params": params}, np.pad(ids, room), np.pad(segments, room))
    assert np.isfinite(out).all()
    return np.where(segments[:, :, None] != 0, np.asarray(out)[: len(ids), : ids.shape[1]], 0)


def error(given, wanted):
    """The largest difference, relative to the largest value."""
    return float(np.abs(given - wanted).max() / np.abs(wanted).max())


def greedy(model, params, prompts, new_tokens):
    """What the largest logits go on with from left-padded prompts (B, T), each time from the whole sequence."""
    ids, segments = prompts, (prompts != 0).astype(np.int32)
    for _ in range(new_tokens):
        new = logits(model, params, ids, segments)[:, -1:].argmax(-1)
        ids = np.concatenate([ids, new.astype(np.int32)], axis=1)
        segments = np.pad(segments, [(0, 0), (0, 1)], constant_values=1)
    return ids[:, prompts.shape[1] :]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_continuations_equal_transformers(name, tmp_path):
    golden, model, params = golden_model(name, tmp_path)
    for key in ("right", "left", "long"):
        given = logits(model, params, golden[key], (golden[key] != 0).astype(np.int32))
        off = error(given, golden[f"float64/{key}"])
        # transformers' own float32 is off by 6e-7 to 3e-6.
        assert off <= 1e-5, (
            f"{key}: {off:.1e}, transformers {error(golden[f'float32/{key}'], golden[f'float64/{key}']):.1e}"
        )
    new_tokens = golden["greedy"].shape[1]
    np.testing.assert_array_equal(greedy(model, params, golden["prompts"], new_tokens), golden["greedy"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mistral", marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.long) for n in CASES if n != "mistral"),
    ],
)
def test_generated_continuations_equal_transformers(name, tmp_path):
    golden, model, params = golden_model(name, tmp_path)
    new_tokens = golden["greedy"].shape[1]
    generate = make_generate(model, model.config, new_tokens=new_tokens, stop=())
    segments = (golden["prompts"] != 0).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), len(segments))
    given = generate({"params": params}, golden["prompts"], segments, Sampling(), keys)
    np.testing.assert_array_equal(given, golden["greedy"])


@pytest.mark.parametrize("name", CASES)
def test_old_and_new_config_files_mean_the_same(name):
    new = json.loads(str(np.load(GOLDEN / f"llama_{name}.npz")["config"]))
    rope = new["rope_parameters"]
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    if "full_attention" in rope:
        old["rope_local_base_freq"], rope = rope["sliding_attention"]["rope_theta"], rope["full_attention"]
    old["rope_theta"] = rope["rope_theta"]
    old["partial_rotary_factor"] = rope.get("partial_rotary_factor")
    left_out = ("rope_theta", "rope_type", "partial_rotary_factor", "original_max_position_embeddings")
    is_phi3 = new["model_type"] == "phi3"  # its old files have the original length outside
    rest = {key: value for key, value in rope.items() if key not in left_out[: 4 if is_phi3 else 3]}
    old["rope_scaling"] = {"type": rope["rope_type"], **rest} if rest else None
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)


@pytest.fixture(scope="module")
def long_inputs():
    """Two rows of 150 tokens, two blocks of queries; in each two sequences, in one with padding on both sides."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 96, (2, 150)).astype(np.int32)
    segments = np.repeat([[0, 1, 2, 0], [1, 1, 2, 2]], [5, 60, 80, 5], axis=1).astype(np.int32)
    return ids, segments


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loads each model once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = golden_model(name, tmp_path_factory.mktemp(name))[1:]
        return loaded[name]

    return get


def value_and_gradient(model, params, inputs, options):
    """Logits, zero at padding, and the gradient of a function of them for every parameter."""
    ids, segments = inputs
    weights = jnp.cos(jnp.arange(model.config.vocab_size, dtype=jnp.float32))

    def total(params):
        out = model.apply({"params": params}, ids, segments)
        out = jnp.where(segments[:, :, None] != 0, out, 0)
        return jnp.sum(jnp.tanh(out) * weights[None, None]), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=options)(params)
    return np.asarray(out), dict(jax.tree_util.tree_leaves_with_path(gradient))


def check_variants(model, params, inputs, variants, options=None):
    wanted, wanted_gradient = value_and_gradient(model.clone(attention="xla"), params, inputs, options)
    for fields in variants:
        given, gradient = value_and_gradient(model.clone(**fields), params, inputs, options)
        assert error(given, wanted) <= VALUES, fields
        for path, leaf in wanted_gradient.items():
            assert error(gradient[path], leaf) <= GRADIENTS, (fields, jax.tree_util.keystr(path))


@pytest.mark.slow
def test_a_variant_has_the_same_values_and_gradients(models):
    golden = np.load(GOLDEN / "llama_mistral.npz")
    inputs = golden["left"], (golden["left"] != 0).astype(np.int32)
    fields = {"unroll": True, "remat": "dots", "attention": "blocked"}
    check_variants(*models("mistral"), inputs, [fields], QUICKLY)


@pytest.mark.long
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_all_variants_have_the_same_values_and_gradients(name, models, long_inputs):
    choices = itertools.product((False, True), ("none", "dots", "full"), ("xla", "blocked"))
    variants = [{"unroll": u, "remat": r, "attention": a} for u, r, a in choices]
    check_variants(*models(name), long_inputs, variants)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama3", "xla"),
        ("mistral", "blocked"),
        *(pytest.param("qwen3", a, marks=pytest.mark.slow) for a in ("xla", "blocked")),
    ],
)
def test_packed_sequences_equal_each_alone(name, attention, models, long_inputs):
    model, params = models(name)
    model, (ids, segments) = model.clone(attention=attention), long_inputs
    rows, numbers = (0, 0, 1, 1), (1, 2, 1, 2)  # all four sequences
    packed = np.asarray(run(model, {"params": params}, ids[rows, :], segments[rows, :]))
    own = [segments[row] == number for row, number in zip(rows, numbers, strict=True)]
    alone = np.stack([np.pad(ids[row][m], (0, (~m).sum())) for row, m in zip(rows, own, strict=True)])
    wanted = np.asarray(run(model, {"params": params}, alone, (alone != 0).astype(np.int32)))
    assert np.isfinite(packed).all()
    for i, mask in enumerate(own):
        assert error(packed[i][mask], wanted[i, : mask.sum()]) <= 1e-5


def test_values_and_amount_of_padding_change_nothing(models):
    model, params = models("dynamic")  # which goes by the longest sequence of the call
    golden = np.load(GOLDEN / "llama_dynamic.npz")
    tokens, wanted = golden["right"][:1], golden["float64/right"][:1]
    length = tokens.shape[1]
    for before in (0, 9, WIDTH - length):
        pads = [(0, 0), (before, WIDTH - length - before)]
        ids, segments = np.pad(tokens, pads, constant_values=5), np.pad(np.ones_like(tokens), pads)
        given = logits(model, params, ids, segments)[:, before : before + length]
        assert error(given, wanted) <= 1e-5


@pytest.mark.slow
def test_bf16_runs_near_float32(models):
    model, params = models("llama3")
    golden = np.load(GOLDEN / "llama_llama3.npz")
    low = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(low.init, jax.random.key(0), IDS)["params"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)  # exact: the file's are rounded
    given = run(low, {"params": halved}, golden["long"])
    assert given.dtype == jnp.float32
    assert run(low, {"params": halved}, golden["long"], method="hidden").dtype == jnp.bfloat16
    assert 1e-4 < error(np.asarray(given), golden["float64/long"]) < BF16


def adapters(model, **fields):
    adapted = apply_lora_plus(model, LoRAPlusConfig(rank=4, lr_ratio=16.0, **fields))
    return adapted, *init_lora(adapted, jax.random.key(1), IDS)


def test_adapters_of_the_named_layers_are_stacked(models):
    _, lora, specs = adapters(models("llama3")[0], target_modules=["q_proj", "v_proj"])
    assert jax.tree.map(jnp.shape, lora) == {
        "layers": {
            "self_attn": {
                "q_proj": {"lora_a": (2, 32, 4), "lora_b": (2, 4, 32)},
                "v_proj": {"lora_a": (2, 32, 4), "lora_b": (2, 4, 16)},
            }
        }
    }
    assert {spec.scale for spec in specs.values()} == {4.0}


@pytest.mark.parametrize(
    ("name", "head"), [("biases", {"lm_head"}), pytest.param("smollm2", set(), marks=pytest.mark.slow)]
)
def test_all_linear_takes_every_product(name, head, models):
    _, _, specs = adapters(models(name)[0], target_modules="all-linear")
    parts = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }
    layers = {f"layers/{part}/{product}" for part, products in parts.items() for product in products}
    assert set(specs) == layers | head


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), pytest.param("all-linear", marks=pytest.mark.slow)]
)
def test_new_adapters_change_nothing_and_trained_ones_equal_merged_weights(targets, models):
    model, params = models("llama3")
    golden = np.load(GOLDEN / "llama_llama3.npz")
    adapted, lora, specs = adapters(model, target_modules=targets)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), lora)
    merged = merge({"params": params}, moved, specs)
    for method in (None, "hidden"):
        call = partial(run, method=method)
        plain = np.asarray(call(model, {"params": params}, golden["long"]))
        new = call(adapted, {"params": params, "lora": lora}, golden["long"])
        np.testing.assert_array_equal(new, plain)
        if method is None:
            assert error(plain, golden["float64/long"]) <= 1e-5  # without segment ids each row is a sequence
        given = np.asarray(call(adapted, {"params": params, "lora": moved}, golden["long"]))
        assert error(given, plain) > 0.1
        assert error(given, np.asarray(call(model, merged, golden["long"]))) <= 1e-5


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
}


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_a_gemma_in_gguf_equals_its_directory(arch, tmp_path):
    """As llama.cpp's converter writes it: 1 is added to the norms' scales, and the rotary halves are not mixed."""
    golden, model, params = golden_model(arch, tmp_path)
    content = {}
    for key in golden:
        if key.startswith("weights/"):
            name, value = key.removeprefix("weights/"), golden[key]
            for theirs, short in GGUF_NAMES.items():
                name = name.replace(f"{theirs}.", f"{short}.")
            content[name] = value + 1 if value.ndim == 1 else value
    c = model.config
    values = {
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.sliding_window": c.sliding_window,
        "rope.freq_base": c.rope_theta,
    }
    if arch == "gemma2":
        values |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    else:
        values |= {"attention.sliding_window_pattern": 3, "rope.freq_base_swa": c.rope_local_theta}
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    file = write(
        tmp_path / "m.gguf", content, {f"{arch}.{key}": value for key, value in values.items()}, arch
    )
    config = LlamaConfig.from_hf(load_config(file))
    # The file does not say what divides the scores: llama.cpp knows that it is the size of a head, but in 27B.
    assert config.query_pre_attn_scalar == c.head_dim
    read = {"rms_norm_eps": c.rms_norm_eps, "initializer_range": 0.3, "query_pre_attn_scalar": 9}
    assert config.rms_norm_eps == pytest.approx(c.rms_norm_eps)
    assert dataclasses.replace(config, **read) == c
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), IDS)["params"]
    found = load_params(file, name_table(config), shapes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-7), found, params)
    weights = GgufWeights(read_gguf(file))
    for name in weights.keys():  # noqa: SIM118
        view = weights.get_slice(name)
        np.testing.assert_allclose(
            view.restored(view[:]),
            content[next(k for k in content if to_hf_name(k, arch) == name)],
            atol=2e-7,
        )


@pytest.mark.slow
def test_smollm2_equals_transformers():
    found = sorted(cache_dir().rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    file = Path(os.environ.get("LORAPLUS_SMOLLM2") or (found[0] if found else "absent"))
    if not file.exists():
        pytest.skip("no SmolLM2: loraplus fetch smollm2-135m")
    golden = np.load(GOLDEN / "smollm2.npz")
    model = Llama(LlamaConfig.from_hf(load_config(file)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    variables = {"params": load_params(file, name_table(model.config), shapes)}
    apply = jax.jit(lambda variables, *given: model.apply(variables, *given)[:, ::4, golden["entries"]])
    logits = np.where(golden["mask"][:, ::4, None], apply(variables, golden["ids"], golden["mask"]), 0)
    assert error(logits, golden["logits"]) <= 1e-4
    generate = make_generate(model, model.config, new_tokens=golden["greedy"].shape[1], stop=())
    keys = jax.random.split(jax.random.key(0), len(golden["ids"]))
    given = generate(variables, golden["ids"], golden["mask"], Sampling(), keys)
    np.testing.assert_array_equal(given, golden["greedy"])
