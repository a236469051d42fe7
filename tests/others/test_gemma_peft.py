"""Adapters of tunix's Gemma and of the package gemma give PEFT's model the same logits.

`save_peft` writes them, and `loraplus convert` from the library's own checkpoint. The base weights come from
transformers: into tunix by its own loader, into gemma here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig, init_lora
from loraplus_jax import apply_lora_plus as adapt_linen
from loraplus_jax.adapter import flatten, unflatten
from loraplus_jax.cli.commands import main
from loraplus_jax.interop import GEMMA, TUNIX_GEMMA
from loraplus_jax.nnx import apply_lora_plus, lora_tree, set_lora, specs_of

from .harness import drawn, to_peft_and_back
from .tiny_gemma import config_of

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.array([[2, 5, 7, 11, 9, 4], [2, 8, 3, 3, 6, 1]])
LAYERS, WINDOW, HEADS, SIZE = 2, 4, 4, 8
TUNIX = {"num_layers": LAYERS, "num_embed": 64, "embed_dim": 16, "hidden_dim": 24, "num_heads": HEADS}
TUNIX |= {"head_dim": SIZE, "sliding_window_size": WINDOW}


@functools.cache
def torch_model(version, kv_heads, layer_types):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name = {2: "Gemma2", 3: "Gemma3Text"}[version]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=SIZE,
        query_pre_attn_scalar=SIZE,
        sliding_window=WINDOW,
        layer_types=[f"{kind}_attention" for kind in layer_types],
        attn_implementation="eager",
        pad_token_id=0,
    )
    model = getattr(transformers, f"Gemma{version}ForCausalLM")(config).float().eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def torch_logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def check_peft(model, plain, adapted, directory):
    """PEFT's logits equal the adapted model's, as the plain ones are equal, and the adapter does something."""
    peft = pytest.importorskip("peft")
    before = torch_logits(model)
    size = np.abs(before).max()
    np.testing.assert_allclose(plain, before, rtol=0, atol=1e-5 * size)
    wrapped = peft.PeftModel.from_pretrained(model, directory)
    after = torch_logits(wrapped)
    wrapped.unload()
    np.testing.assert_allclose(adapted, after, rtol=0, atol=1e-5 * size)
    assert np.abs(after - before).max() > 0.1 * size


def convert(checkpoint, tree, base, *words):
    """What `loraplus convert` makes for PEFT of a tree in a checkpoint of orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoint, tree)
    out = base.with_name("converted")
    command = ("convert", checkpoint, "--to", "peft", "--base", base, "--out", out, *words)
    assert main([*map(str, command)]) == 0
    return out


def tunix_gemma(version, kv_heads, directory):
    """tunix's model with the weights of `torch_model`, and this."""
    name = {2: "gemma", 3: "gemma3"}[version]
    models = pytest.importorskip(f"tunix.models.{name}.model")
    params = pytest.importorskip(f"tunix.models.{name}.params_safetensors")
    if version == 2:
        kinds = models.AttentionType
        config = models.ModelConfig(
            **TUNIX,
            num_kv_heads=kv_heads,
            final_logit_softcap=30.0,
            attn_logits_soft_cap=50.0,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        )
    else:
        config = models.ModelConfig(
            **TUNIX,
            num_kv_heads=kv_heads,
            local_base_frequency=10_000,
            global_base_frequency=1_000_000,
            param_dtype=jnp.float32,
        )
    # The first five layers of tunix's Gemma 3 are local.
    theirs = torch_model(version, kv_heads, ("sliding", "full" if version == 2 else "sliding"))
    theirs.save_pretrained(directory)
    return params.create_model_from_safe_tensors(str(directory), config, dtype=jnp.float32), theirs


def tunix_inputs():
    length = IDS.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(IDS), length, length))
    return jnp.asarray(IDS), jnp.tile(jnp.arange(length), (len(IDS), 1)), None, mask


@pytest.mark.parametrize(("version", "kv_heads"), [(2, 2), (3, 2), (3, 4)])
def test_tunix_with_our_adapters(version, kv_heads, tmp_path):
    model, theirs = tunix_gemma(version, kv_heads, tmp_path / "base")
    plain = model(*tunix_inputs())[0]
    config = LoRAPlusConfig(
        target_modules=r".*(_einsum|_proj)",
        target_parameters={"embedder/input_embedding": "io"},
        rank=2,
        alpha=3.0,
    )
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    set_lora(model, drawn(lora_tree(model)))
    to_peft_and_back(tmp_path / "peft", lora_tree(model), specs, config, TUNIX_GEMMA)
    check_peft(theirs, plain, model(*tunix_inputs())[0], tmp_path / "peft")


@pytest.mark.parametrize(("version", "kv_heads"), [(2, 2), (3, 4)])
def test_tunix_with_qwix(version, kv_heads, tmp_path):
    qwix = pytest.importorskip("qwix")
    model, theirs = tunix_gemma(version, kv_heads, tmp_path / "base")
    plain = model(*tunix_inputs())[0]
    provider = qwix.LoraProvider(module_path=".*(_einsum|_proj)", rank=2, alpha=3.0)
    model = qwix.apply_lora_to_model(model, provider, *tunix_inputs(), rngs=nnx.Rngs(1))
    factors = drawn(nnx.state(model, nnx.LoRAParam))
    nnx.update(model, factors)
    to_peft_and_back(tmp_path / "peft", *specs_of(model, scale=1.5), TUNIX_GEMMA)
    converted = convert(tmp_path / "checkpoint/7/model_params", factors, tmp_path / "base", "--alpha", "3")
    for directory in (tmp_path / "peft", converted):
        check_peft(theirs, plain, model(*tunix_inputs())[0], directory)


def gemma_params(theirs, kv_heads, transposed):
    """The parameters of the package gemma from those of transformers."""
    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}

    def heads(*names):  # (heads * size, in) to (heads, in, size)
        found = [
            weights[f"{layer}.self_attn.{n}_proj.weight"].reshape(-1, SIZE, 16).swapaxes(1, 2) for n in names
        ]
        return {"w": np.stack(found) if len(names) > 1 else found[0]}

    def norm(name):
        return {"scale": weights[f"{layer}.{name}.weight"]}

    params = {
        "embedder": {"input_embedding": weights["model.embed_tokens.weight"]},
        "final_norm": {"scale": weights["model.norm.weight"]},
    }
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        mlp = {name: weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        gating = np.stack([mlp["gate"], mlp["up"]])
        params[f"layer_{n}"] = {
            "attn": {
                **(
                    {"qkv_einsum": heads("q", "k", "v")}
                    if kv_heads == HEADS
                    else {"q_einsum": heads("q"), "kv_einsum": heads("k", "v")}
                ),
                "attn_vec_einsum": {
                    "w": weights[f"{layer}.self_attn.o_proj.weight"].T.reshape(HEADS, SIZE, 16)
                },
                "_query_norm": norm("self_attn.q_norm"),
                "_key_norm": norm("self_attn.k_norm"),
            },
            "mlp": {
                "gating_einsum": gating if transposed else gating.swapaxes(1, 2),
                "linear": mlp["down"].T,
            },
            "pre_attention_norm": norm("input_layernorm"),
            "post_attention_norm": norm("post_attention_layernorm"),
            "pre_ffw_norm": norm("pre_feedforward_layernorm"),
            "post_ffw_norm": norm("post_feedforward_layernorm"),
        }
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize(("kv_heads", "transposed"), [(2, True), (4, False)])
def test_gemma_with_its_own_adapters(kv_heads, transposed, tmp_path):
    gm = pytest.importorskip("gemma.gm")

    sizes = {"num_embed": 64, "num_heads": HEADS, "head_dim": SIZE, "num_kv_heads": kv_heads}
    rope = {"local_base_frequency": 10_000, "global_base_frequency": 1_000_000}
    config = config_of(gm, **sizes, **rope, sliding_window_size=WINDOW, transpose_gating_einsum=transposed)
    net = gm.nn.Transformer(config=config, dtype=jnp.float32)
    model = gm.nn.LoRA(rank=2, model=net, dtype=jnp.float32)
    theirs = torch_model(3, kv_heads, ("sliding", "full"))
    theirs.save_pretrained(tmp_path / "base")
    base = gemma_params(theirs, kv_heads, transposed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(IDS))["params"]
    params = unflatten(flatten(drawn(shapes)) | flatten(base))
    plain = net.apply({"params": base}, jnp.asarray(IDS)).logits
    adapted = model.apply({"params": params}, jnp.asarray(IDS)).logits
    lora, specs, config = specs_of(params, scale=1.0)
    assert to_peft_and_back(tmp_path / "peft", lora, specs, config, GEMMA).config == config
    # The whole checkpoint: its other tensors are the base's.
    converted = convert(tmp_path / "checkpoint", {"params": params}, tmp_path / "base")
    for directory in (tmp_path / "peft", converted):
        check_peft(theirs, plain, adapted, directory)
    # The config gives the plain model the same adapters.
    assert init_lora(adapt_linen(net, config), jax.random.key(0), jnp.asarray(IDS))[1] == specs
