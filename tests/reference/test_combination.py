"""Combined adapters have the factors of PEFT's `add_weighted_adapter`, on a transformer and on small layers."""

import itertools

import jax
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from peft.utils import merge_utils

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, save_peft
from loraplus_jax.interop import Adapter, combine_adapters
from loraplus_jax.interop.adapter_directory import read_tensors
from loraplus_jax.interop.combination import random_mask
from loraplus_jax.interop.path_map import adapted_leaves, factors_to_peft
from loraplus_jax.interop.peft_files import WEIGHTS, peft_options
from loraplus_jax.nnx import apply_lora_plus as adapt_nnx
from loraplus_jax.nnx import lora_tree

from .families import Pair, random

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LIMIT = 1e-6
WEIGHTS_OF = {"a": 0.7, "b": -0.4, "c": 1.3}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.words = nnx.Embed(40, 16, rngs=rngs)
        self.window = nnx.Conv(4, 16, (3, 2), rngs=rngs)
        self.inner = nnx.Linear(16, 24, rngs=rngs)


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(40, 16)
        self.conv = torch.nn.Conv2d(4, 16, (3, 2))
        self.fc = torch.nn.Linear(16, 24)


class NNXPair:
    """The same small model in NNX and in PyTorch."""

    linear = ("inner", "window", "words")
    path_map = (("words", "emb"), ("window", "conv"), ("inner", "fc"))

    def adapter(self, config, seed):
        model = Net(nnx.Rngs(0))
        specs = adapt_nnx(model, config, rngs=nnx.Rngs(1))
        return Adapter(random(lora_tree(model), seed), specs, config, {})

    def reference(self):
        return TorchNet()


class LinenPair(Pair):
    def adapter(self, config, seed):
        lora, specs = init_lora(apply_lora_plus(self.model, config), jax.random.key(0), *self.inputs)
        return Adapter(random(lora, seed), specs, config, {})


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    """A pair, adapters of different layers and scales, by name, and PEFT's model with all of them."""
    folder = tmp_path_factory.mktemp(request.param)
    pair = NNXPair() if request.param == "nnx" else LinenPair(request.param, folder / "base")
    one, two, three = pair.linear[:3]
    fields = {
        "a": {"target_modules": (one, three), "rank": 4, "alpha": 8.0},
        "b": {"target_modules": (one, two), "rank": 4, "alpha": 2.0},
        "c": {"target_modules": (one, two, three), "rank": 4, "alpha": 5.0},
        "wide": {"target_modules": (two, one), "rank": 6, "alpha": 3.0},
    }
    adapters, theirs = {}, None
    for seed, (name, values) in enumerate(fields.items()):
        adapters[name] = adapter = pair.adapter(LoRAPlusConfig(**values), seed)
        save_peft(folder / name, adapter.lora, adapter.specs, adapter.config, pair.path_map)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(pair.reference(), folder / name, adapter_name=name)
        else:
            theirs.load_adapter(folder / name, name)
    return pair, adapters, theirs


def our_masks(pair, adapters, density, seed):
    """The masks of `random_mask` in PEFT's layout, by the bytes of the factor that each is for."""
    masks = {}
    for number, adapter in enumerate(adapters.values()):
        for module, target in adapted_leaves(adapter.specs, pair.path_map)[0].items():
            leaf = adapter.lora
            for part in module.split("/"):
                leaf = leaf[part]
            own = target.spec.factors_of(module)
            factors = [np.asarray(leaf[factor.path.rpartition("/")[2]]) for factor in own]
            drawn = []
            for factor, value in zip(own, factors, strict=True):
                mask = random_mask(factor.rows(value).shape, density, seed, number, factor.path)
                drawn.append(factor.restore(mask).astype(np.float32))
            both = zip(factors_to_peft(factors, target), factors_to_peft(drawn, target), strict=True)
            for (_, values), (_, kept) in both:
                for value, mask in zip(values, kept, strict=True):
                    masks[np.ascontiguousarray(value).tobytes()] = torch.from_numpy(np.array(mask))
    return masks


WAYS = [
    ("linear", {}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 3}),
    ("ties", {"density": 0.6}),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("dare_linear", {"density": 0.6}),
    ("dare_ties", {"density": 0.6}),
    ("magnitude_prune", {"density": 0.6}),
]


@pytest.mark.parametrize(
    ("world", "way"), list(zip(itertools.cycle(["bert", "nnx"]), WAYS)), indirect=["world"], ids=str
)
def test_the_factors_are_those_of_peft(world, way, tmp_path, monkeypatch):
    pair, adapters, theirs = world
    how, options = way
    third = "wide" if how in ("cat", "svd") else "c"  # of another rank
    chosen = {name: adapters[name] for name in ("a", "b", third)}
    weights = [*WEIGHTS_OF.values()]
    ours = combine_adapters(chosen, weights, how, **options, **({"seed": 3} if "dare" in how else {}))
    save_peft(tmp_path / "ours", ours.lora, ours.specs, ours.config, pair.path_map)
    given = read_tensors(tmp_path / "ours" / WEIGHTS)
    masks = our_masks(pair, chosen, options.get("density", 1.0), seed=3)

    def pruned(tensor, density, rescale):
        assert rescale
        return tensor * masks[tensor.contiguous().numpy().tobytes()] / density

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    name = f"{how}{len(theirs.peft_config)}"
    if how == "svd":  # in float32 its own rounding is above the limit
        theirs.double()
    theirs.add_weighted_adapter([*chosen], weights, name, combination_type=how, **options)
    wanted = {
        key: value.numpy()
        for key, value in peft.get_peft_model_state_dict(theirs, adapter_name=name).items()
        if "lora_" in key
    }
    theirs.float()
    read = peft_options(tmp_path / "ours")
    assert read.scale(read.rank, read.alpha) == 1
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert {layer.scaling[name] for layer in layers if name in layer.scaling} == {1}
    assert given.keys() == wanted.keys()
    if how == "svd":  # singular vectors have any sign, so that their product is compared
        given, wanted = products(given), products(wanted)
    for key, value in wanted.items():
        assert given[key].shape == value.shape, key
        assert np.abs(value - given[key]).max() <= LIMIT * np.abs(value).max(), key
        assert np.abs(value).max() > 1e-3


def products(tensors):
    """B A of every module."""
    pairs = {}
    for name, tensor in tensors.items():
        module = name.split(".lora_")[0]
        side = "lora_A" in name or "embedding_A" in name
        pairs.setdefault(module, {})[side] = np.asarray(tensor, np.float64).reshape(len(tensor), -1)
    return {module: pair[False] @ pair[True] for module, pair in pairs.items()}
