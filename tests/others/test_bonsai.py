"""Models of bonsai with our adapters, run by its own jitted `forward`; each at a small random size.

`.ci/run` installs bonsai from GitHub; where that cannot be reached, it leaves this file out.
"""

import dataclasses
import functools
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from loraplus_jax import LoRAPlusConfig, lora_plus_adamw
from loraplus_jax.interop import library_path_maps
from loraplus_jax.nnx import apply_lora_plus, check_reads, lora_tree, merge, set_lora

from ..messages import mentions
from ..pages import run
from .harness import RATIO, assert_close, assert_equal, assert_trains_and_resumes, drawn, to_peft_and_back

pytest.importorskip("bonsai.models")
from bonsai.models.gemma3 import modeling as gemma3_lib
from bonsai.models.gemma3 import params as gemma3_params
from bonsai.models.qwen3 import modeling as qwen3_lib
from bonsai.models.qwen3 import params as qwen3_params
from bonsai.models.vit import modeling as vit_lib
from bonsai.models.vit import params as vit_params
from bonsai.utils.params import map_to_bonsai_key, stoi

IDS = jnp.array([[5, 9, 2, 7, 3, 4, 6, 8], [1, 2, 3, 4, 5, 6, 7, 8]])
IMAGES = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
RATE, RANK, ALPHA = 3e-3, 2, 6.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of bonsai.

    Attributes:
      make: builds it.
      call: the model's outputs, differentiable.
      forward: the same or a part of it, by bonsai's own jitted function.
      inputs: arguments of `check_reads`.
      rules: what to adapt, as fields of `LoRAPlusConfig`.
      leaves: the weights that these adapt, without the number of the layer.
      names: transformers' names.
      files: bonsai's own table of the names in transformers' checkpoints.
      renamed: what transformers calls the parts of a model in files but not in modules.
    """

    make: Callable[[], nnx.Module]
    call: Callable[[Any], jax.Array]
    forward: Callable[[Any], jax.Array]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    rules: dict[str, Any]
    leaves: set[str]
    names: Any
    files: dict[str, Any]
    renamed: tuple[tuple[str, str], ...] = ()


def qwen3():
    """Projections by `nnx.Einsum`, a cache as an argument, and a read of the embedding past its layer."""
    config = qwen3_lib.ModelConfig(
        num_layers=2,
        vocab_size=32,
        emb_dim=16,
        mlp_dim=24,
        num_heads=4,
        head_dim=6,
        num_kv_heads=2,
        rope_theta=10_000,
        rope_scaling_factor=8.0,
        local_rope_theta=1e4,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    cache = lambda: qwen3_lib.init_cache(config, 2, 8, 0, jnp.float32)  # noqa: E731
    inputs = lambda: ((IDS,), {"cache": cache(), "segment_ids": jnp.ones_like(IDS)})  # noqa: E731

    def call(model):
        args, kwargs = inputs()
        return model(*args, **kwargs)

    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return Case(
        make=lambda: qwen3_lib.Qwen3(config, rngs=nnx.Rngs(0)),
        call=call,
        forward=lambda model: qwen3_lib.forward(model, cache(), IDS, 0)[0],
        inputs=inputs,
        rules={"target_modules": [*projections, "gate_proj", "down_proj", "lm_head"]},
        leaves={f"layers//attn/{name}/kernel" for name in projections}
        | {"layers//mlp/gate_proj/kernel", "layers//mlp/down_proj/kernel", "lm_head/kernel"},
        names=library_path_maps.BONSAI_QWEN3,
        files=qwen3_params._get_key_and_transform_mapping(config),
    )


def gemma3():
    """Text and images, an embedding that is also the head, and a cache as an argument."""
    modes = [gemma3_lib.AttentionMode.SLIDE, gemma3_lib.AttentionMode.FULL]
    text = gemma3_lib.TextConfig(
        attention_bias=False,
        attention_dropout=0.0,
        head_dim=6,
        hidden_size=16,
        intermediate_size=24,
        layer_types=modes,
        max_position_embeddings=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_full_factor=8.0,
        rope_full_theta=1e6,
        rope_slide_factor=1.0,
        rope_slide_theta=1e4,
        sliding_window=4,
        vocab_size=32,
        norm_dtype=jnp.float32,
    )
    vision = gemma3_lib.VisionConfig(
        attention_dropout=0.0,
        hidden_size=12,
        image_size=8,
        intermediate_size=20,
        layer_norm_eps=1e-6,
        num_attention_heads=2,
        num_channels=3,
        num_hidden_layers=1,
        patch_size=2,
        vision_use_head=False,
    )
    config = gemma3_lib.ModelConfig(vision, text, 4, "float32", None)
    images = jnp.broadcast_to(jnp.arange(8) < 4, (2, 8)).astype(jnp.int32)  # the first four tokens
    ones = jnp.ones_like(IDS)

    def inputs():
        cache = gemma3_lib.init_cache(config, 2, 8, 0, jnp.float32)
        return (IDS, IMAGES), {"cache": cache, "segment_ids": ones, "token_type_ids": images}

    def make():
        model = gemma3_lib.Gemma3Model(config, rngs=nnx.Rngs(0))
        projection = model.multi_modal_projector.mm_input_projection_weight
        projection.set_value(drawn(projection.get_value()))  # zeros would hide the images
        return model

    def call(model):
        args, kwargs = inputs()
        return model(*args, **kwargs)

    def forward(model):
        (ids, pixels), rest = inputs()
        return gemma3_lib.forward(model, rest["cache"], ids, pixels, ones, images)[0]

    return Case(
        make=make,
        call=call,
        forward=forward,
        inputs=inputs,
        rules={"target_modules": r".*/(q_proj|o_proj|up_proj|fc2)|embed_tokens/weight"},
        leaves={
            *(
                f"language_model/layers//{n}/kernel"
                for n in ("self_attn/q_proj", "self_attn/o_proj", "mlp/up_proj")
            ),
            *(f"vision_tower/encoder/layers//{n}/kernel" for n in ("self_attn/q_proj", "mlp/fc2")),
            "embed_tokens/weight/embedding",
        },
        names=library_path_maps.BONSAI_GEMMA3,
        files=gemma3_params._get_key_and_transform_mapping(),
        renamed=(
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower.vision_model."),
        ),
    )


def vit():
    """`nnx.MultiHeadAttention`, a convolution, and a forward that takes the split model."""
    config = vit_lib.ModelConfig(
        image_size=(8, 8),
        patch_size=(4, 4),
        num_channels=3,
        hidden_dim=12,
        attn_dropout_prob=0.0,
        dropout_prob=0.0,
        num_heads=2,
        mlp_dim=20,
        eps=1e-6,
        num_layers=2,
        num_labels=5,
    )
    attention = (f"attention/{name}" for name in ("query", "key", "value", "out"))
    return Case(
        make=lambda: vit_lib.ViTClassificationModel(config, rngs=nnx.Rngs(0)),
        call=lambda model: model(IMAGES, rngs=None),
        forward=lambda model: vit_lib.forward(*nnx.split(model), IMAGES, nnx.Rngs(0)),
        inputs=lambda: ((IMAGES,), {"rngs": None}),
        rules={"target_modules": "all-linear"},
        leaves={f"layers//{name}/kernel" for name in (*attention, "linear1", "linear2")}
        | {"classifier/kernel"},
        names=library_path_maps.BONSAI_VIT,
        files=vit_params._get_key_and_transform_mapping(config),
        renamed=(
            ("vit.layers", "vit.encoder.layer"),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ),
    )


CASES = {make.__name__: make for make in (qwen3, gemma3, vit)}
every = pytest.mark.parametrize("name", CASES)


def adapted(name):
    case = CASES[name]()
    model = case.make()
    config = LoRAPlusConfig(rank=RANK, alpha=ALPHA, lr_ratio=RATIO, **case.rules)
    return case, model, config, apply_lora_plus(model, config, rngs=nnx.Rngs(1))


@every
def test_the_adapted_model_is_the_merged_one_in_the_library_s_own_forward(name):
    case, model, _, specs = adapted(name)
    np.testing.assert_array_equal(case.forward(model), case.forward(case.make()))  # B is zero
    leaves = {"/".join(p for p in spec.leaf.split("/")[1:] if not p.isdigit()) for spec in specs.values()}
    assert leaves == {leaf.replace("//", "/") for leaf in case.leaves}
    args, kwargs = case.inputs()
    check_reads(model, *args, **kwargs)
    set_lora(model, drawn(lora_tree(model)))
    got, plain = case.forward(model), case.forward(case.make())
    assert float(jnp.abs(got - plain).max()) > 0.05 * float(jnp.abs(plain).max())
    assert_close(got, case.forward(merge(model)), 2e-5)


def test_the_read_of_qwen3_s_embedding_past_its_layer_is_found():
    case = qwen3()
    model = case.make()
    apply_lora_plus(model, LoRAPlusConfig(target_modules=["embedder"], rank=2), rngs=nnx.Rngs(1))
    args, kwargs = case.inputs()
    with pytest.raises(ValueError, match=mentions("'embedder'", "embedder/embedding", "outside")):
        check_reads(model, *args, **kwargs)


class NnxLoop:
    """The loop of an adapted model, whose factors are not zero."""

    def __init__(self, name):
        case, self.model, self.config, self.specs = adapted(name)
        set_lora(self.model, drawn(lora_tree(self.model)))
        tx = lora_plus_adamw(RATE, lr_ratio=RATIO, specs=self.specs)
        self._optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.LoRAParam)

        def loss_fn(model):
            y = case.call(model)
            labels = jnp.arange(y[..., 0].size).reshape(y.shape[:-1]) % y.shape[-1]
            return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
            optimizer.update(model, grads)
            return loss

        self._step = step

    @property
    def state(self):
        return nnx.state((self.model, self._optimizer))

    def factors(self):
        return lora_tree(self.model)

    def step(self):
        return float(self._step(self.model, self._optimizer))

    def restore(self, state):
        nnx.update((self.model, self._optimizer), state)


@every
def test_it_trains_resumes_and_exports(name, tmp_path):
    case, _, _, specs = adapted(name)
    layers = [spec for spec in specs.values() if spec.kind != "embed"]
    make = functools.partial(NnxLoop, name)
    loop = assert_trains_and_resumes(make, tmp_path, modules=len(layers), steps=8, below=0.95)
    now = nnx.state(loop.model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    # Leaves only: the metadata of one of gemma3's parameters holds generators.
    assert_equal(jax.tree.leaves(now), jax.tree.leaves(nnx.state(case.make(), nnx.Param)))
    to_peft_and_back(tmp_path / "peft", loop.factors(), specs, loop.config, case.names)
    plain = case.make()
    add_peft(plain, case, tmp_path / "peft")
    assert_close(case.forward(plain), case.forward(loop.model), 2e-5)


def add_peft(model, case, directory):
    """Adds the products of a PEFT file to the weights that bonsai's own loader would put under those names."""
    tensors = load_file(directory / "adapter_model.safetensors")
    heads = {f"{rule[1]}.lora_A.weight" for rule in case.names if rule[2:] == ("TiedHead",)}
    for key, a in tensors.items():
        match = key.removeprefix("base_model.model.")
        # A tied head repeats the factors of its embedding.
        if not match.endswith((".lora_A.weight", ".lora_embedding_A")) or match in heads:
            continue
        b = tensors[key.replace("_A", "_B")]
        delta = ALPHA / RANK * (b @ a)  # (out, in)
        name = match.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A") + ".weight"
        if key.endswith("embedding_A"):
            delta = delta.T
        for new, old in case.renamed:
            name = name.replace(new, old)
        path, transform = map_to_bonsai_key(case.files, name)
        if transform.value is not None:
            permute, shape, shape_first = transform.value
            delta = delta.reshape(shape) if shape_first else delta
            delta = delta.transpose(permute)
            delta = delta if shape_first or shape is None else delta.reshape(shape)
        node = model
        for part in map(stoi, path.replace("\\", "").split(".")):
            node = node[part] if isinstance(part, int) else getattr(node, part)
        node.set_value(node.get_value() + delta)


def test_the_example_learns():
    before, after = runpy.run_path(str(Path(__file__).parents[2] / "examples/10_bonsai.py"))["main"]()
    assert after < 0.9 * before


def test_the_page_on_vision_trains_its_vit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("vision", "NNX")
    assert names["accuracy"](names["logits"]) > 0.8
    assert {path.partition("/")[0] for path in names["specs"]} == {"layers", "pos_embeddings"}
