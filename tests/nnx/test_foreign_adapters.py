"""Adapters that other libraries put into a model, read into our trees and specs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import describe, load_adapter, lora_plus_adamw, merge, save_adapter, save_peft
from loraplus_jax.interop.peft_files import load_peft
from loraplus_jax.nnx import apply_lora_plus, specs_of

from ..messages import mentions
from ..refusals import refusals

X = jax.random.normal(jax.random.key(1), (2, 8))


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


class LinearModel(nnx.Module):
    """`nnx.LoRALinear`, and `nnx.LoRA` around a layer."""

    def __init__(self, rngs):
        self.up = nnx.LoRALinear(8, 6, lora_rank=2, rngs=rngs)
        self.down = nnx.LoRA(6, 2, 3, base_module=nnx.Linear(6, 3, rngs=rngs), rngs=rngs)
        self.up.lora.lora_b[...] = drawn(2, 6)
        self.down.lora_b[...] = drawn(2, 3)

    def __call__(self, x):
        return self.down(self.up(x))


def merged_kernels(model, scale):
    """The kernels of the merged model, by our `merge`, and the specs."""
    lora, specs, _ = specs_of(model, scale=scale)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return merge({"params": params}, lora, specs)["params"], specs


def test_lora_of_flax():
    model = LinearModel(nnx.Rngs(0))
    kernels, specs = merged_kernels(model, 1.0)
    assert {path: (spec.leaf, spec.shape, spec.rank) for path, spec in specs.items()} == {
        "down": ("params/down/base_module/kernel", (6, 3), 2),
        "up": ("params/up/kernel", (8, 6), 2),
    }
    y = X @ kernels["up"]["kernel"] @ kernels["down"]["base_module"]["kernel"]
    np.testing.assert_allclose(y, model(X), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rank", "scale"), [(6, 0.1), (12, 0.7)])
def test_any_scale_can_be_saved(tmp_path, rank, scale):
    theirs = {"head": {"kernel": X.T @ X, "lora_a": jnp.ones((8, rank)), "lora_b": jnp.ones((rank, 8))}}
    lora, specs, config = specs_of(theirs, scale=scale)
    save_adapter(tmp_path / "a", lora, specs, config)
    assert load_adapter(tmp_path / "a").specs["head"].scale == pytest.approx(scale, rel=1e-15)


def test_a_model_of_one_layer():
    layer = nnx.LoRALinear(8, 6, lora_rank=2, rngs=nnx.Rngs(0))
    _, specs, config = specs_of(layer, scale=1.0)
    assert (list(specs), specs[""].leaf) == ([""], "params/kernel")
    plain = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    assert apply_lora_plus(plain, config, rngs=nnx.Rngs(1)) == specs


class Projection(nnx.Module):
    """As tunix has it, with the factors that qwix adds."""

    def __init__(self, rngs):
        self.einsum_str = "BTD,DNH->BTNH"
        self.w = nnx.Param(drawn(8, 2, 3))
        self.w_lora_a, self.w_lora_b = nnx.LoRAParam(drawn(8, 2)), nnx.LoRAParam(drawn(2, 2, 3))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = Projection(rngs)
        self.out = nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs)
        # qwix flattens the axes of each side
        self.out.kernel_lora_a, self.out.kernel_lora_b = (
            nnx.LoRAParam(drawn(6, 2)),
            nnx.LoRAParam(drawn(2, 8)),
        )


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Attention(rngs) for _ in range(2)])


@pytest.mark.slow
def test_factors_of_qwix_get_the_axes_of_their_weight(tmp_path):
    lora, specs, config = specs_of(Model(nnx.Rngs(0)), scale=2.0)
    assert list(specs) == [f"layers/{n}/{name}" for n in range(2) for name in ("out", "q_proj")]
    assert (specs["layers/0/q_proj"].axes, specs["layers/0/out"].axes) == ("ioo", "iio")
    assert lora["layers"]["0"]["out"]["lora_a"].shape == (2, 3, 2)
    rows = describe(lora, lora_plus_adamw(1e-3, lr_ratio=8.0), specs)
    assert "0.008" in str(rows)
    names = [("layers/{n}/{p}", "model.layers.{n}.self_attn.{p}")]
    save_peft(tmp_path / "peft", lora, specs, config, names)
    jax.tree.map(np.testing.assert_array_equal, load_peft(tmp_path / "peft", specs, names).lora, lora)


def test_a_tree_needs_letters_where_shapes_do_not_tell():
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    with pytest.raises(ValueError, match=mentions("layers/0/out/kernel", "(2, 3, 8)", "'iio'", "axes")):
        specs_of(state, scale=2.0)
    axes = {".*/out/kernel": "iio", ".*/q_proj/w": "ioo"}
    with pytest.raises(ValueError, match=mentions("axes", "'.*/k_proj/w'")):
        specs_of(state, scale=2.0, axes=axes | {".*/k_proj/w": "ioo"})
    with pytest.raises(ValueError, match=mentions("layers/0/out/lora_a", "(6, 2)")):
        specs_of(state, scale=2.0, axes=axes | {".*/out/kernel": "ioi"})
    assert specs_of(state, scale=2.0, axes=axes).specs == specs_of(Model(nnx.Rngs(0)), scale=2.0).specs


W, A, B = drawn(4, 3), drawn(4, 2), drawn(2, 3)
FORMS = {
    "ours": {"kernel": W, "lora_a": A, "lora_b": B},
    "nnx": {"kernel": {"value": W}, "lora_a": {"value": A}, "lora_b": {"value": B}},
    "qwix": {"kernel": W, "kernel_lora_a": A, "kernel_lora_b": B},
    "gemma": {"kernel": W, "lora": {"a": A, "b": B}},
    "keras": {"kernel": W, "lora_kernel_a": A, "lora_kernel_b": B},
}


@pytest.mark.parametrize("form", FORMS)
def test_roles_go_by_side(form):
    lora, specs, _ = specs_of({"net": {"fc": FORMS[form]}}, scale=1.0)
    (path,) = specs
    assert path == "net/fc"
    leaves = jax.tree.leaves(lora)
    np.testing.assert_array_equal(leaves[0], A)
    np.testing.assert_array_equal(leaves[1], B)


def gemma_layer():
    """The raw weights of gemma's Linen modules with its adapters; keys and values share A."""
    return {
        "attn": {
            "kv_einsum": {
                "w": drawn(2, 4, 8, 3),
                "_LoRAEinsum_0": {"lora": {"a": drawn(8, 2), "b": drawn(2, 2, 4, 3)}},
            }
        },
        "mlp": {
            "gating_einsum": drawn(2, 8, 5),
            "_LoRAEinsum_gating_einsum": {"lora": {"a": drawn(8, 2), "b": drawn(2, 2, 5)}},
            "linear": drawn(5, 8),
            "_LoRAEinsum_linear": {"lora": {"a": drawn(5, 2), "b": drawn(2, 8)}},
        },
    }


@pytest.mark.slow
def test_gemma_s_factors_of_raw_weights():
    params = {"layer_0": gemma_layer()}
    lora, specs, config = specs_of({"params": params}, scale=1.0)
    assert {path: (spec.leaf, spec.kind, spec.axes) for path, spec in specs.items()} == {
        f"layer_0/{path}": (f"params/layer_0/{path}", "parameter", axes)
        for path, axes in (("attn/kv_einsum/w", "ooio"), ("mlp/gating_einsum", "oio"), ("mlp/linear", "io"))
    }
    assert config.target_modules == ()
    assert config.target_parameters == {path: spec.axes for path, spec in specs.items()}
    merged = merge({"params": params}, lora, specs)["params"]["layer_0"]
    attn, mlp = gemma_layer()["attn"]["kv_einsum"], gemma_layer()["mlp"]
    expected = attn["w"] + jnp.einsum("dr,rcnh->cndh", *attn["_LoRAEinsum_0"]["lora"].values())
    np.testing.assert_allclose(merged["attn"]["kv_einsum"]["w"], expected, rtol=0, atol=1e-5)
    for name, equation in (("gating_einsum", "dr,rch->cdh"), ("linear", "hr,rd->hd")):
        expected = mlp[name] + jnp.einsum(equation, *mlp[f"_LoRAEinsum_{name}"]["lora"].values())
        np.testing.assert_allclose(merged["mlp"][name], expected, rtol=0, atol=1e-5)


def test_axes_of_equal_size_must_be_told():
    factors = {"a": drawn(8, 2), "b": drawn(2, 8, 3)}
    tree = {"q": {"w": drawn(8, 8, 3), "_LoRAEinsum_0": {"lora": factors}}}
    with pytest.raises(ValueError, match=mentions("q/w", "(8, 8, 3)", "'ioo'", "'oio'")):
        specs_of(tree, scale=1.0)
    assert specs_of(tree, scale=1.0, axes={"q/w": "oio"}).specs["q/w"].axes == "oio"


PAIR = {"kernel_lora_a": drawn(8, 2), "kernel_lora_b": drawn(2, 5)}
KERNEL = {"kernel": drawn(8, 6)}

# As a library stores it that has (out, in), or not.
SQUARE = {"weight": drawn(8, 8), "weight_lora_a": drawn(8, 2), "weight_lora_b": drawn(2, 8)}
test_trees_that_cannot_be_read_are_named = refusals(
    (lambda: specs_of({"fc": KERNEL}, scale=1.0), "adapters"),
    (lambda: specs_of({"fc": {"lora_a": drawn(8, 2), "lora_b": drawn(2, 6)}}, scale=1.0), "fc", "weight"),
    (lambda: specs_of({"fc": KERNEL | PAIR}, scale=1.0), "fc", "(2, 5)"),
    (lambda: specs_of({"q": SQUARE}, scale=1.0), "q/weight", "(8, 8)", "io", "oi"),
    error=ValueError,
)


def test_variables_of_keras_by_path(tmp_path):
    variables = {
        "net/embed/embeddings": drawn(7, 4),
        "net/embed/lora_embeddings_a": drawn(7, 2),
        "net/embed/lora_embeddings_b": drawn(2, 4),
        "net/out/kernel": drawn(4, 3),
        "net/out/bias": drawn(3),
        "net/out/lora_kernel_a": drawn(4, 2),
        "net/out/lora_kernel_b": drawn(2, 3),
    }
    lora, specs, config = specs_of(variables, scale=2.0)
    assert {path: (spec.kind, spec.leaf) for path, spec in specs.items()} == {
        "net/embed": ("embed", "params/net/embed/embeddings"),
        "net/out": ("dense", "params/net/out/kernel"),
    }
    names = [("net/{name}", "{name}")]
    save_peft(tmp_path / "adapter", lora, specs, config, names)
    loaded = load_peft(tmp_path / "adapter", specs, names).lora
    np.testing.assert_array_equal(loaded["net"]["embed"]["lora_embedding_b"], drawn(2, 4))
    np.testing.assert_array_equal(loaded["net"]["out"]["lora_a"], drawn(4, 2))
