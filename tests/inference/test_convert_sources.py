"""Sources of conversions: what they read, and what they make of each weight by formulas of their own."""

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax.adapter.tree import flatten
from loraplus_jax.inference.checkpoint_merge import CheckpointMerge
from loraplus_jax.inference.convert_sources import (
    PeftSource,
    TreeSource,
    check_base_tensors,
)
from loraplus_jax.inference.named_base import named_base
from loraplus_jax.models.files import open_files

from ..fuzz.damage import peak_limit
from ..interop.library_trees import LIBRARIES
from ..messages import mentions
from ..refusals import refusals
from .conversions import (
    expected_weights,
    modules_of,
    write_base,
    write_library,
    write_openpi_base,
    write_peft,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return named_base(open_files(write_base(tmp_path_factory.mktemp("base") / "llama")))


def merged(source, base):
    """What `CheckpointMerge` makes of the weights, in another way than `Source.weights`."""
    named = source.read(base)
    table, leaves = base.table()
    merge = CheckpointMerge(table, leaves, named.adapter.specs, named.adapter.lora, named.adapter.extras)
    return {
        name: merge.value(name, lambda n: base.tensors[n][:]) for name in base.tensors if merge.changes(name)
    }


def check(source, base):
    found, expected = dict(source.weights(base)), merged(source, base)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
    return found


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_tree(name, base, tmp_path):
    """By its names or by `--from`, of each library: the changes are those that its own equations make."""
    if name == "openpi":
        base = named_base(open_files(write_openpi_base(tmp_path / "base")))
    file, library = tmp_path / "tree.safetensors", name.removeprefix("old ")
    changes, options = write_library(name, file)
    source = TreeSource(file, **options)
    found, expected = check(source, base), expected_weights(base.files.path, changes)
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-5)
    assert library in source.about
    assert (TreeSource(file, library, **options).recipe, len(found)) == (source.recipe, len(changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 5}}]
)
def test_peft(options, base, tmp_path):
    modules = modules_of(base.files.path, "v_proj", "up_proj")
    directory = write_peft(tmp_path / "peft", modules, base.files.path, **options)
    source = PeftSource(directory)
    assert len(check(source, base)) == 4
    assert ("DoRA" in source.about, "null" in source.about) == ("dora" in options, False)
    open_targets = write_peft(tmp_path / "null", modules, base.files.path, target_modules=None, **options)
    assert "null" in PeftSource(open_targets).about


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("has_copy", [False, True], ids=["factors alone", "with the base's weight"])
def test_an_embedding_of_peft(has_copy, dora, base, tmp_path):
    directory = write_peft(tmp_path / "peft", {"model.embed_tokens": (4, 4)}, base.files.path, dora=dora)
    rng, name = np.random.default_rng(3), "base_model.model.model.embed_tokens.lora_embedding_{}"
    vocabulary, size = base.shape("model.embed_tokens.weight")
    tensors = {
        name.format("A"): rng.normal(size=(2, vocabulary)).astype(np.float32),
        name.format("B"): rng.normal(size=(size, 2)).astype(np.float32),
    }
    if has_copy:  # as PEFT saves it
        weight = np.asarray(base.tensors["model.embed_tokens.weight"][:])
        tensors["base_model.model.model.embed_tokens.base_layer.weight"] = weight
    if dora:
        magnitudes = (1 + rng.random(size)).astype(np.float32)
        tensors["base_model.model.model.embed_tokens.lora_magnitude_vector"] = magnitudes
    save_file(tensors, directory / "adapter_model.safetensors")
    assert list(check(PeftSource(directory), base)) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(("name", "is_levanter"), [("model.layers.0.mlp", True), ("h.0.mlp", False)])
def test_only_levanter_puts_its_prefix_before_a_model_s(name, is_levanter, base, tmp_path):
    """Falcon, GPT-J, BLOOM and others have modules transformer.h."""
    source = PeftSource(write_peft(tmp_path / "a", {name: (4, 4)}, base.files.path, prefix="transformer."))
    assert source.is_levanter(base) == is_levanter


def reading(*ends, **options):
    """Reads an adapter of PEFT for the modules of the base whose names end so."""

    def call(base, tmp_path):
        PeftSource(
            write_peft(tmp_path / "peft", modules_of(base.files.path, *ends), base.files.path, **options)
        ).read(base)

    return call


test_what_the_options_select_must_be_in_the_file = refusals(
    (reading("v_proj", fan_in_fan_out=True), "fan_in_fan_out", "gpt2", "llama"),  # another model's
    (reading("q_proj", target_modules=["q_proj", "lm_head"]), "lm_head", "factors"),
    (reading("q_proj", target_modules=["q_proj", "embed_tokens"]), "model.embed_tokens", "factors"),
    (reading("q_proj", modules_to_save=["lm_head"]), "lm_head", "modules_to_save"),
    (reading("q_proj", modules_to_save=["down_proj"]), "model.layers.0.mlp.down_proj", "modules_to_save"),
    lines=9,
)


@pytest.mark.parametrize(
    ("adapted", "changed"),
    [
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.base_layer.weight"),
        ("lm_head", "lm_head.base_layer.weight"),
        ("lm_head", "model.embed_tokens.weight"),
    ],
)
def test_a_copy_of_the_base_must_be_the_base_s(adapted, changed, tmp_path):
    """PEFT loads it, into an embedding that is also the head if they are tied."""
    base = named_base(open_files(write_base(tmp_path / "base", tie_word_embeddings=True)))
    weight = base.tensors[f"{'model.embed_tokens' if 'layers' not in adapted else adapted}.weight"][:]
    directory = write_peft(
        tmp_path / "peft", {adapted: weight.shape}, base.files.path, target_modules=[adapted]
    )
    file, source = directory / "adapter_model.safetensors", PeftSource(directory)
    tensors = load_file(file)
    save_file(tensors | {f"base_model.model.{changed}": weight}, file)
    check(source, source.base_for(base))
    save_file(tensors | {f"base_model.model.{changed}": weight + 1}, file)
    with pytest.raises(ValueError, match=mentions(changed, base.files.path)):
        source.read(source.base_for(base))


def test_own_variables_have_no_place_in_pytorch(base, tmp_path):
    directory = write_peft(tmp_path / "peft", modules_of(base.files.path, "q_proj"), base.files.path)
    (directory / "loraplus.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=mentions("loraplus.safetensors", "run")):
        PeftSource(directory)


def test_tensors_must_be_the_base_s(base):
    tensors = load_file(base.files.path / "model.safetensors")
    q = [tensors[f"model.layers.{n}.self_attn.q_proj.weight"] for n in range(2)]
    k, v = (tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "kv")
    good = {
        "transposed": q[0].T,
        "heads": q[0].reshape(4, 8, 32).transpose(2, 0, 1),
        "stacked": np.stack(q),
        "parts": np.stack([[k, v]]),
        "half": q[0].astype(np.float16),
    }
    check_base_tensors("tree", good, base)
    for name, bad in (
        ("trained", q[0] + 1e-3),
        ("half stacked", np.stack([q[0], q[0] + 1])),
        ("step", np.array(3)),
    ):
        with pytest.raises(ValueError, match=mentions(name, "--leave_out")):
            check_base_tensors("tree", good | {name: bad}, base)


def test_openpi_s_weights_are_those_of_its_pytorch_form(tmp_path):
    base = named_base(open_files(write_openpi_base(tmp_path / "base")))
    tensors = load_file(base.files.path / "model.safetensors")
    model = "paligemma_with_expert.gemma_expert.model.layers"
    read = lambda name: np.stack([tensors[f"{model}.{n}.{name}_proj.weight"] for n in range(2)])  # noqa: E731
    q, k, v, out = (read(f"self_attn.{x}") for x in "qkvo")
    heads = lambda x: x.reshape(2, -1, 8, 32).swapaxes(2, 3)  # noqa: E731
    whole = {
        "attn/q_einsum_1/w": heads(q),
        "attn/kv_einsum_1/w": np.stack([heads(k), heads(v)], 1),
        "attn/attn_vec_einsum_1/w": out.swapaxes(1, 2).reshape(2, 4, 8, 32),
        "mlp_1/gating_einsum": np.stack([read(f"mlp.{x}").swapaxes(1, 2) for x in ("gate", "up")], 1),
        "pre_attention_norm_1/scale": np.stack(
            [tensors[f"{model}.{n}.input_layernorm.weight"] for n in range(2)]
        ),
    }
    check_base_tensors("openpi", whole, base)
    whole["action_in_proj/kernel"] = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=mentions("action_in_proj/kernel")):
        check_base_tensors("openpi", whole, base)


def test_leave_out_must_match(tmp_path):
    _, options = write_library("qwix", tmp_path / "qwix.safetensors")
    with pytest.raises(ValueError, match=mentions("--leave_out", "'other'")):
        TreeSource(tmp_path / "qwix.safetensors", leave_out=["other"], **options)


@pytest.mark.parametrize(
    ("place", "hint"),
    [("opt_state", "opt_state/.*"), ("train/optimizer", "train/optimizer/.*"), ("1", "1/0/.*")],
)
def test_an_optimizer_s_state_is_left_out_by_its_path(place, hint, base, tmp_path):
    _, options = write_library("qwix", tmp_path / "qwix.safetensors")
    factors = load_file(tmp_path / "qwix.safetensors")
    # optax.adam's, whose moments have the factors' names.
    state = flatten(jax.tree.map(np.asarray, {"0": optax.adam(1e-3).init(factors)[0]._asdict()}))
    save_file(factors | {f"{place}/{path}": x for path, x in state.items()}, tmp_path / "state.safetensors")
    rule = mentions(f"--leave_out '{hint}'")
    for library in (None, "qwix"):
        with pytest.raises(ValueError, match=rule):
            TreeSource(tmp_path / "state.safetensors", library, **options).read(base)
    source = TreeSource(tmp_path / "state.safetensors", leave_out=[hint], **options)
    assert len(source.read(base).adapter.specs) == 10
    count = {f"{place}/0/count": state["0/count"]}
    save_file(factors | count, tmp_path / "count.safetensors")
    if place != "1":
        with pytest.raises(ValueError, match=rule):
            TreeSource(tmp_path / "count.safetensors", **options).read(base)


@pytest.mark.parametrize(
    ("factor", "words"),
    [(np.ones((32, 0), np.float32), ("(32, 0)",)), (np.ones((32, 3), np.complex64), ("complex64",))],
    ids=["rank 0", "complex"],
)
def test_what_is_no_factor(factor, words, base, tmp_path):
    _, options = write_library("qwix", tmp_path / "qwix.safetensors")
    tree, owner = load_file(tmp_path / "qwix.safetensors"), "layers/0/mlp/gate_proj/kernel_lora"
    tree[f"{owner}_a/value"] = factor
    tree[f"{owner}_b/value"] = tree[f"{owner}_b/value"][: factor.shape[1]]
    np.savez(tmp_path / "a.npz", **tree)
    with pytest.raises(ValueError, match=mentions("a.npz", f"{owner}_a", *words)):
        TreeSource(tmp_path / "a.npz", **options).read(base)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"rope_theta": 500_000.0}, {"rope_theta": (500_000, 1_000_000)}),
        (
            {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
            {"rope_theta": (500_000, 1_000_000), "rope_scaling": ("llama3",)},
        ),
        ({"rope_parameters": {"rope_theta": 1e6, **LLAMA3}}, {"rope_scaling": ("llama3",)}),
        ({"model_type": "qwen3", "rope_theta": 5_000_000}, {"rope_theta": (5_000_000, 1_000_000)}),
        ({"model_type": "qwen3"}, {}),
        ({"model_type": "qwen2", "rope_theta": 10_000}, {}),
        (
            {"model_type": "qwen2", "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": ("linear",)},
        ),
    ],
    ids=["llama 3", "llama 3.1", "transformers 5", "qwen3 2507", "qwen3", "qwen2", "qwen2 scaled"],
)
def test_tunix_computes_with_angles_of_its_own(config, fields, tmp_path):
    """Its Llama 3 and Qwen3 ignore rope_theta, and none of its models but Gemma 3 has a scaling."""
    base = named_base(open_files(write_base(tmp_path / "base")))
    base = base._replace(config=base.config | config)
    _, options = write_library("qwix", tmp_path / "qwix.safetensors")
    source = TreeSource(tmp_path / "qwix.safetensors", **options)
    if not fields:
        assert source.read(base).adapter.specs
        return
    flags = [f"base.config.{name}" for name in fields]
    values = [value for values in fields.values() for value in values]
    with pytest.raises(ValueError, match=mentions("tunix", base.files.path, *values, *flags)):
        source.read(base)
    for allowed in (flags, ["base.config"]):
        source = TreeSource(tmp_path / "qwix.safetensors", **options, allow_different=allowed)
        assert source.read(base).adapter.specs
    if len(flags) == 2:
        source = TreeSource(tmp_path / "qwix.safetensors", **options, allow_different=flags[:1])
        with pytest.raises(ValueError, match=mentions(flags[1])):
            source.read(base)


def test_factors_of_others_have_the_angles_of_their_base(base, tmp_path):
    _, options = write_library("maxtext", tmp_path / "maxtext.safetensors")
    base = base._replace(config=base.config | {"rope_theta": 500_000.0})
    assert TreeSource(tmp_path / "maxtext.safetensors", **options).read(base).adapter.specs
    for library, part in (("maxtext", "base.config"), ("qwix", "tokenizer")):
        _, options = write_library(library, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=mentions("--allow_different", part)):
            TreeSource(tmp_path / "a.safetensors", **options, allow_different=[part])


def test_heads_beyond_those_of_the_base_take_no_memory(base, tmp_path):
    """As many components as heads, for all outputs of all heads: the square of their number."""
    _, options = write_library("keras", tmp_path / "keras.safetensors")
    tree, owner = (
        load_file(tmp_path / "keras.safetensors"),
        "transformer_layer_0/self_attention/query/lora_kernel",
    )
    tree |= {f"{owner}_a": np.zeros((32, 2000, 1), np.float32), f"{owner}_b": np.zeros((1, 32), np.float32)}
    save_file(tree, tmp_path / "heads.safetensors")
    with peak_limit(0), pytest.raises(ValueError, match=mentions("heads.safetensors", 64_000, "q_proj")):
        TreeSource(tmp_path / "heads.safetensors", **options).read(base)


def test_what_is_no_number_is_no_tensor_of_the_base(base):
    for value in (np.array(["a"]), np.array(["2020"], "M8[s]"), np.ones(3, np.complex64)):
        with pytest.raises(ValueError, match=mentions("other", "--leave_out")):
            check_base_tensors("tree", {"other": value}, base)
