"""Layers that the model families lack, on small PyTorch modules: Conv1D, Conv2d, heads, experts; the optimizer."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.numpy import load_file
from transformers.pytorch_utils import Conv1D

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    describe,
    init_lora,
    label_params,
    lora_plus_adamw,
    split_trainable,
)
from loraplus_jax.adapter.tree import flatten, unflatten
from loraplus_jax.interop.peft_files import load_peft, peft_config, save_peft

from .families import off

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LIMIT = 1e-4


class TorchGPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(12, 6), Conv1D(6, 12)

    def forward(self, x):
        return self.c_proj(torch.nn.functional.gelu(self.c_attn(x), approximate="tanh"))


class FlaxGPT(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="c_proj")(nn.gelu(nn.Dense(12, name="c_attn")(x)))


class TorchConv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, (3, 2), stride=2, padding=(1, 0))
        self.square = torch.nn.Conv2d(8, 8, 3)
        self.fc = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.square(self.conv(x))).mean((2, 3)))


class FlaxConv(nn.Module):
    @nn.compact
    def __call__(self, x):  # (B, H, W, C)
        x = nn.Conv(8, (3, 2), strides=2, padding=((1, 1), (0, 0)), name="conv")(x)
        x = nn.Conv(8, (3, 3), padding="VALID", name="square")(x)
        return nn.Dense(4, name="fc")(nn.relu(x).mean((1, 2)))


class TorchHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(11, 8)
        self.q, self.o, self.norm = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8), torch.nn.LayerNorm(8)

    def forward(self, ids):
        return self.norm(self.o(torch.tanh(self.q(self.emb(ids)))))


class FlaxHeads(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="emb")(ids)
        x = jnp.tanh(nn.DenseGeneral((3, 4), name="q")(x))
        return nn.LayerNorm(1e-5, use_fast_variance=False, name="norm")(
            nn.DenseGeneral(8, axis=(-2, -1), name="o")(x)
        )


class Experts(torch.nn.Module):
    """PEFT adapts a parameter of three axes as (experts, out, in)."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.einsum("ebi,eoi->ebo", x, self.w)


class TorchExperts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


class FlaxExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((3, 4, 5), "ebi,eio->ebo", use_bias=False, name="experts")(x)


IMAGES = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype(np.float32)
ROWS = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
IDS = np.arange(10, dtype=np.int32).reshape(2, 5)
SETS = np.random.default_rng(2).normal(size=(3, 7, 4)).astype(np.float32)
CASES = {
    "Conv1D": (
        *(TorchGPT, FlaxGPT, ROWS, ROWS, ["c_attn", "c_proj"]),
        (("c_attn", "c_attn", "Conv1D"), ("c_proj", "c_proj", "Conv1D")),
    ),
    "Conv2d": (
        *(TorchConv, FlaxConv, IMAGES, IMAGES.transpose(0, 3, 1, 2), ["conv", "square", "fc"]),
        (("conv", "conv", "Conv"), ("square", "square", "Conv"), ("fc", "fc")),
    ),
    "heads": (*(TorchHeads, FlaxHeads, IDS, IDS, ["emb", "q", "o"]), (("{name}", "{name}"),)),
    "experts": (
        *(TorchExperts, FlaxExperts, SETS, SETS, ["experts"]),
        (("experts", "experts.w", "Parameter"),),
    ),
}


def kernel_of(path, value, shape):
    """A weight of PyTorch as ours, written for the modules above alone."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if path == "experts":
        return value.transpose(0, 2, 1)
    return value.reshape(shape) if path.startswith("c_") or path == "emb" else value.T.reshape(shape)


def both(name):
    torch_class, flax_class, given, theirs, targets, rules = CASES[name]
    torch.manual_seed(0)
    base, net = torch_class(), flax_class()
    state = {k: v.detach().numpy() for k, v in base.state_dict().items()}
    shapes = jax.eval_shape(net.init, jax.random.key(0), given)["params"]
    params = {}
    for module, leaves in shapes.items():
        params[module] = {}
        for leaf, shape in leaves.items():
            value = state.get(f"{module}.{'bias' if leaf == 'bias' else 'weight'}", state.get(f"{module}.w"))
            is_flat = leaf in ("bias", "scale")
            params[module][leaf] = (
                value.reshape(shape.shape) if is_flat else kernel_of(module, value, shape.shape)
            )
    ids = torch.from_numpy(theirs)
    return base, net, params, given, ids.long() if ids.dtype == torch.int32 else ids, targets, rules


def run(model, x):
    with torch.no_grad():
        return model(x).numpy()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Conv1D", {"use_rslora": True}),
        ("Conv2d", {"use_dora": True}),
        ("heads", {"use_dora": True}),
        ("heads", {"rank_pattern": {"q": 2}, "alpha_pattern": {"o": 3}}),
        ("experts", {"target_parameters": ["experts.w"], "target_modules": []}),
    ],
)
def test_layers_have_the_values_and_gradients_of_peft_and_its_files(name, options, tmp_path):
    base, net, params, given, theirs, targets, rules = both(name)
    made = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets} | options)
    adapted = peft.get_peft_model(copy.deepcopy(base), made).eval()
    trained = {path: p for path, p in adapted.named_parameters() if "lora_" in path}
    with torch.no_grad():
        for path, parameter in trained.items():
            new = torch.randn(parameter.shape) * 0.3
            parameter.copy_(parameter + new if "magnitude" in path else new)
    adapted.save_pretrained(tmp_path / "a")
    result = adapted(theirs)
    torch.sin(result).sum().backward()
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(parameter.grad)  # pyright: ignore[reportArgumentType]
    adapted.save_pretrained(tmp_path / "g")
    config = peft_config(tmp_path / "a", rules)
    model = apply_lora_plus(net, config)
    _, specs = init_lora(model, jax.random.key(0), given, base={"params": params})
    lora, wanted = (load_peft(tmp_path / name, specs, rules, params=params).lora for name in "ag")

    @jax.jit
    def outputs_and_gradient(lora):
        outputs, back = jax.vjp(lambda lora: model.apply({"params": params, "lora": lora}, given), lora)
        return outputs, *back(jnp.cos(outputs))

    found, gradients = outputs_and_gradient(lora)
    outputs = result.detach().numpy()
    assert off(run(base, theirs), outputs) > 1e-2, "the adapter does nothing"
    assert off(found, outputs) <= LIMIT
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    for gradient, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert off(gradient, expected) <= LIMIT
    save_peft(tmp_path / "b", lora, specs, config, rules)
    ours, files = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ba")
    # PEFT also writes the base's embedding.
    assert ours.keys() == {key for key in files if "base_layer" not in key}
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, files[key])
    again = peft.PeftModel.from_pretrained(base, tmp_path / "b").eval()
    assert off(run(again, theirs), outputs) <= LIMIT


def test_convolutions_in_groups_are_rejected_by_their_shapes(tmp_path):
    """PEFT's A sees all channels and ours those of a group: not the same layer."""
    net = nn.Sequential([nn.Conv(8, (3,), feature_group_count=2)])
    base = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3, groups=2, padding=1))
    config = LoRAPlusConfig(target_modules=["layers_0"], rank=2)
    lora, specs = init_lora(apply_lora_plus(net, config), jax.random.key(0), jnp.ones((1, 9, 4)))
    rules = [("layers_0", "0")]
    save_peft(tmp_path / "a", lora, specs, config, rules)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(base, tmp_path / "a")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=16, target_modules=["0"]))
    adapted.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="factors"):
        load_peft(tmp_path / "b", specs, rules)


def test_twenty_steps_are_those_of_peft_s_own_optimizer():
    """`policy="peft"` against `create_loraplus_optimizer`, from the same weights and gradients, group by group."""
    base, net, params, given, _, targets, _ = both("heads")
    made = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["norm"], bias="lora_only")
    adapted = peft.get_peft_model(base, made)
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if "lora_" in path:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "eps": 1e-8}
    optimizer = create_loraplus_optimizer(adapted, torch.optim.AdamW, **settings)
    theirs = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    config = LoRAPlusConfig(target_modules=targets, rank=2, modules_to_save=["norm"], bias="lora_only")
    model = apply_lora_plus(net, config)
    lora, specs = init_lora(model, jax.random.key(0), given)
    ours, _ = split_trainable({"params": params, "lora": lora}, config.modules_to_save, bias=config.bias)
    names = names_in_torch(ours, theirs)
    flat = {path: as_ours(theirs[name].detach().numpy().copy(), path, ours) for path, name in names.items()}
    trainable = unflatten(flat)
    tx = lora_plus_adamw(1e-3, lr_ratio=8.0, weight_decay=0.1, policy="peft", specs=specs)
    state, rng = tx.init(trainable), np.random.default_rng(0)
    update = jax.jit(tx.update)
    for _ in range(20):
        grads = {}
        for path, name in names.items():
            value = rng.normal(size=theirs[name].shape).astype(np.float32)
            theirs[name].grad = torch.from_numpy(value)
            grads[path] = as_ours(value, path, ours)
        optimizer.step()
        updates, state = update(unflatten(grads), state, trainable)
        trainable = jax.tree.map(jnp.add, trainable, updates)
    roles = flatten(label_params(trainable, specs, policy="peft"))
    seen = set()
    for path, leaf in flatten(trainable).items():
        wanted = as_ours(theirs[names[path]].detach().numpy(), path, ours)
        assert np.abs(leaf - wanted).max() <= 1e-6 * max(1.0, np.abs(wanted).max()), (path, roles[path])
        assert not np.array_equal(wanted, flat[path]), path
        seen.add(roles[path])
    assert seen == {"a", "b", "embedding", "vector"}


def names_in_torch(ours, theirs):
    """Our path to the name of the parameter in PEFT's model; none is left over."""
    found = {}
    for path in flatten(ours):
        _, module, leaf = path.split("/")
        end = {
            "lora_a": ("lora_A.default.weight",),
            "lora_b": ("lora_B.default.weight",),
            "lora_embedding_a": ("lora_embedding_A.default",),
            "lora_embedding_b": ("lora_embedding_B.default",),
            "bias": ("base_layer.bias", "modules_to_save.default.bias"),
            "scale": ("modules_to_save.default.weight",),
        }[leaf]
        found[path] = next(n for n in theirs if any(n.endswith(f".{module}.{e}") for e in end))
    assert sorted(found.values()) == sorted(theirs)
    return found


def as_ours(value, path, like):
    shape = flatten(like)[path].shape
    return (value.T if value.ndim == 2 else value).reshape(shape)


class TorchKinds(torch.nn.Module):
    """One of every kind of parameter that PEFT groups apart."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc = torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8)
        self.norm, self.rms = torch.nn.LayerNorm(8), torch.nn.RMSNorm(8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.rms(self.norm(self.fc(self.emb(x)))))


class FlaxKinds(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="fc")(nn.Embed(10, 8, name="emb")(x))
        return nn.Dense(4, name="head")(nn.RMSNorm(name="rms")(nn.LayerNorm(name="norm")(x)))


@pytest.mark.parametrize(
    ("saved", "bias"), [([], "none"), (["norm"], "all"), (["norm", "rms", "head"], "lora_only")]
)
def test_groups_are_those_of_peft(saved, bias):
    """Every trained parameter's rate and decay: `create_loraplus_optimizer`'s groups, and our description."""
    made = peft.LoraConfig(r=2, target_modules=["emb", "fc"], modules_to_save=saved or None, bias=bias)
    adapted = peft.get_peft_model(TorchKinds(), made)
    optimizer = create_loraplus_optimizer(
        adapted, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    theirs = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            module, *_, leaf = name.removeprefix("base_model.model.").replace(".default", "").split(".")
            kind = next((part for part in name.split(".") if part.startswith("lora_")), None)
            leaf = "bias" if leaf == "bias" else "kernel" if module == "head" else "scale"
            path = f"params/{module}/{leaf}" if kind is None else f"lora/{module}/{kind.lower()}"
            theirs[path] = groups[id(parameter)]
    config = LoRAPlusConfig(
        target_modules=["emb", "fc"], rank=2, modules_to_save=saved, bias=bias, lr_ratio=8.0
    )
    ids, net = jnp.array([[1, 2]]), FlaxKinds()
    lora, specs = init_lora(apply_lora_plus(net, config), jax.random.key(0), ids)
    trainable, _ = split_trainable({**net.init(jax.random.key(1), ids), "lora": lora}, config)
    tx = lora_plus_adamw(1e-3, config.lr_ratio, weight_decay=0.1, policy="peft", specs=specs)
    ours = {row.path: (row.rate, row.decay) for row in describe(trainable, tx, specs).rows}
    assert ours.keys() == theirs.keys()
    for path, group in theirs.items():
        assert ours[path] == pytest.approx(group), path
