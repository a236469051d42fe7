"""Combined adapters: TIES by hand, sums of weights for every layout of factors, and what cannot be combined."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, load_adapter, save_adapter
from loraplus_jax.adapter.lora import weight_delta
from loraplus_jax.adapter.tree import flatten, unflatten
from loraplus_jax.interop import Adapter, combine_adapters
from loraplus_jax.interop.combination import largest_mask, random_mask

from ..messages import mentions
from ..refusals import refusals
from .models import IDS, Net, spec_of

CONFIG = LoRAPlusConfig(target_modules=["m"], rank=2, alpha=3.0)


def adapter(specs, config=CONFIG, seed=0, dtype=jnp.float32, **fields):
    """Random factors; in layers without adapters they are zero."""
    rng, lora = np.random.default_rng(seed), {}
    for module, spec in specs.items():
        for path, shape in zip(spec.factor_paths(module), spec.factor_shapes, strict=True):
            lora[path] = jnp.asarray(rng.normal(size=shape), dtype)
            if spec.layers is not None:  # stacked on the first axis
                lora[path] = lora[path] * np.isin(np.arange(shape[0]), spec.layers)[:, None, None]
    return Adapter(unflatten(lora), specs, config, {}, **fields)


def small(scale, a, b):
    spec = spec_of("dense", "io", (4, 2), rank=1, scale=scale)
    config = LoRAPlusConfig(target_modules=["m"], rank=1, alpha=scale)
    pair = {"lora_a": jnp.array(a)[:, None], "lora_b": jnp.array(b)[None]}
    return Adapter({"m": pair}, {"m": spec}, config, {})


def delta(adapter, module):
    spec, flat = adapter.specs[module], flatten(adapter.lora)
    return np.asarray(weight_delta(*(flat[path] for path in spec.factor_paths(module)), spec))


@pytest.mark.parametrize(
    ("method", "a", "b"),
    [(None, [8.0, 2.0, 6.0, 6.0], [-9.0, -4.0]), ("frequency", [-3.0, 2.0, 6.0, 6.0], [2.0, -4.0])],
)
def test_ties_by_hand(method, a, b):
    # Half of each factor stays: of A 4 and 3, -3 and 2, -1 and 2; of B -2, 2 and -3. The roots of w s are 2, 1, 3.
    # A's first entry: 4 - 3 - 1 = 0 counts as positive, so that 2 * 4 is alone; but two of three are negative, with
    # the mean (1 * -3 + 3 * -1) / 2. B's first entry: 2 - 3 < 0 leaves 3 * -3; one of each sign leaves 1 * 2.
    first = small(2.0, [4.0, -1.0, 3.0, 0.5], [1.0, -2.0])
    second = small(2.0, [-3.0, 2.0, 1.0, -0.5], [2.0, 1.0])
    third = small(3.0, [-1.0, 0.1, 0.2, 2.0], [-3.0, 1.0])
    adapters = {"first": first, "second": second, "third": third}
    result = combine_adapters(adapters, [2.0, 0.5, 3.0], "ties", density=0.5, majority_sign_method=method)
    np.testing.assert_allclose(result.lora["m"]["lora_a"][:, 0], a, rtol=1e-6)
    np.testing.assert_allclose(result.lora["m"]["lora_b"][0], b, rtol=1e-6)
    assert (result.specs["m"].scale, result.config.alpha, result.config.rank) == (1.0, 1.0, 1)


def test_linear_by_hand():
    # w s = 4 and -9: 2 * 1 - 3 * 2 in A, whose sign is that of w s, and 2 * 1 + 3 * 5 in B
    adapters = {"a": small(2.0, [1.0] * 4, [1.0, 1.0]), "b": small(3.0, [2.0] * 4, [5.0, 0.0])}
    result = combine_adapters(adapters, [2, -3], "linear")
    np.testing.assert_allclose(result.lora["m"]["lora_a"][:, 0], [-4.0] * 4, rtol=1e-6)
    np.testing.assert_allclose(result.lora["m"]["lora_b"][0], [17.0, 2.0], rtol=1e-6)


SPECS = {
    "dense": spec_of("dense", "io", (6, 7)),
    "stacked": spec_of("dense", "io", (6, 3, 7), stacked=(1,)),
    "stacked twice": spec_of("dense", "io", (2, 6, 3, 7), stacked=(2, 0)),
    "einsum": spec_of("einsum", "ioi", (4, 5, 3)),
    "batch": spec_of("parameter", "oei", (6, 3, 7)),
    "conv": spec_of("conv", "iiio", (2, 3, 2, 8)),
    "embedding": spec_of("embed", "io", (9, 6), leaf="params/m/embedding"),
}


@pytest.mark.parametrize("name", SPECS)
def test_cat_and_svd_are_the_sum_in_every_layout(name):
    wide = dataclasses.replace(SPECS[name], rank=1, scale=0.5)
    adapters = {
        "a": adapter({"m": SPECS[name]}),
        "b": adapter({"m": wide}, dataclasses.replace(CONFIG, rank=1, alpha=0.5), seed=1),
    }
    wanted = 0.6 * delta(adapters["a"], "m") - 2 * delta(adapters["b"], "m")
    for how, options in (("cat", {}), ("svd", {"svd_rank": 3})):
        result = combine_adapters(adapters, [0.6, -2], how, **options)
        assert (result.specs["m"].rank, result.specs["m"].scale) == (3, 1.0)
        np.testing.assert_allclose(delta(result, "m"), wanted, rtol=1e-4, atol=1e-5)
    assert combine_adapters(adapters, [0.6, -2], "svd").specs["m"].rank == 2


def test_svd_is_the_closest_of_its_rank_in_every_layer():
    spec = spec_of("dense", "io", (3, 6, 7), stacked=(0,))
    adapters = {n: adapter({"m": spec}, seed=n) for n in (0, 1)}
    result = combine_adapters({str(n): a for n, a in adapters.items()}, [1, 1], "svd", svd_rank=1)
    total = sum(delta(a, "m") for a in adapters.values())
    for layer in range(3):
        u, s, v = np.linalg.svd(total[layer])
        np.testing.assert_allclose(delta(result, "m")[layer], s[0] * np.outer(u[:, 0], v[0]), atol=1e-4)


def test_pruning_is_by_matrix_and_random_masks_depend_on_seed_adapter_and_path():
    rows = np.stack([np.arange(6.0).reshape(2, 3), 100 + np.arange(6.0).reshape(2, 3)])
    assert largest_mask(rows, 0.5).sum((1, 2)).tolist() == [3, 3]
    assert largest_mask(rows, 1.0).all()
    shape, drawn = (100, 100), []
    for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        drawn.append(random_mask(shape, 0.3, *key))
        assert abs(drawn[-1].mean() - 0.3) < 0.02
        assert (drawn[-1] == random_mask(shape, 0.3, *key)).all()
    assert not any((x == drawn[0]).all() for x in drawn[1:])
    assert random_mask(shape, 1.0, 0, 0, "a").all()


def wrapped(**fields):
    config = LoRAPlusConfig(**fields)
    model = apply_lora_plus(Net(), config)
    lora, specs = init_lora(model, jax.random.key(0), IDS)
    leaves, structure = jax.tree.flatten(lora)
    rng = np.random.default_rng(len(specs))
    lora = structure.unflatten(
        [jnp.asarray(rng.normal(size=x.shape) * (x.std() > 0), x.dtype) for x in leaves]
    )
    return Adapter(lora, specs, config, {})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_adapters_of_other_layers_give_a_config_that_makes_their_layers(how, tmp_path):
    fields = {"target_modules": ("fc",), "use_rslora": True}
    adapters = {
        "a": wrapped(rank=2, layers_to_transform=(0,), **fields),
        "b": wrapped(rank=2 if how == "linear" else 1, layers_to_transform=(2,), **fields),
        "c": wrapped(target_parameters={"other_head/kernel": "io"}, rank=2),
    }
    result = combine_adapters(adapters, [1, 1, 0.5], how)
    assert result.config is not None
    _, specs = init_lora(apply_lora_plus(Net(), result.config), jax.random.key(0), IDS)
    assert specs == result.specs
    assert result.specs["blocks/fc"].layers == (0, 2)
    assert not result.config.use_rslora
    save_adapter(tmp_path / "a", result.lora, result.specs, result.config)
    assert load_adapter(tmp_path / "a").specs == result.specs
    deltas = [delta(adapters[n], "blocks/fc") for n in "ab"]
    np.testing.assert_allclose(delta(result, "blocks/fc"), sum(deltas), rtol=1e-4, atol=1e-6)
    wanted = 0.5 * delta(adapters["c"], "other_head/kernel")
    np.testing.assert_allclose(delta(result, "other_head/kernel"), wanted, rtol=1e-4, atol=1e-6)


def test_equal_rules_stay_and_factors_keep_their_dtype():
    spec = spec_of("dense", "io", (6, 7))
    config = dataclasses.replace(CONFIG, init="gaussian", lr_ratio=8.0)
    adapters = {str(n): adapter({"m": spec}, config, n, jnp.bfloat16) for n in (0, 1)}
    result = combine_adapters(adapters, [0.5, 0.5], "linear")
    assert result.config == dataclasses.replace(config, alpha=2.0, init="lora")
    assert {x.dtype for x in jax.tree.leaves(result.lora)} == {jnp.dtype(jnp.bfloat16)}


def test_one_rank_for_all_layers_where_their_sides_allow_it():
    wide, narrow = spec_of("dense", "io", (8, 8)), spec_of("dense", "io", (3, 8), leaf="params/n/kernel")
    both = LoRAPlusConfig(target_modules=["m", "n"], rank=2, alpha=3.0)
    adapters = {"a": adapter({"m": wide, "n": narrow}, both), "b": adapter({"m": wide}, seed=1)}
    result = combine_adapters(adapters, [1, 1], "cat")
    assert {path: spec.rank for path, spec in result.specs.items()} == {"m": 4, "n": 3}
    assert {path: (result.config.rank_of(path), result.config.scale_of(path)) for path in "mn"} == {
        "m": (4, 1.0),
        "n": (3, 1.0),
    }
    assert not np.asarray(result.lora["n"]["lora_b"])[2].any()


DENSE = spec_of("dense", "io", (6, 7))


def pair(other=None, config=CONFIG, **fields):
    second = adapter({"m": other or DENSE}, config, seed=1, **fields)
    return {"one": adapter({"m": DENSE}), "two": second}


def combining(adapters, how="cat", weights=None, **options):
    weights = [1.0] * len(adapters) if weights is None else weights
    return lambda: combine_adapters(adapters, weights, how, **options)


def unlike(**changes):
    return pair(dataclasses.replace(DENSE, **changes))


UNDER_TWO_PATHS = {
    "a": adapter({"m": DENSE}),
    "b": adapter({"m/kernel": dataclasses.replace(DENSE, kind="parameter")}),
}
test_what_cannot_be_combined = refusals(
    (combining({}), "adapters", "none"),
    (combining({"one": Adapter({}, {}, CONFIG, {})}), "one", "no factors"),
    (combining(pair(), "sum"), "how", "'sum'", "dare_ties"),
    (combining(pair(), "ties"), "ties", "density"),
    (combining(pair(), density=0.5), "density", "cat", "remove"),
    (combining(pair(), "magnitude_prune", density=0), "density", 0),
    (combining(pair(), "ties", density=1.5), "density", 1.5),
    (combining(pair(), "ties", density=0.5, majority_sign_method="all"), "'all'", "frequency"),
    (combining(pair(), "linear", svd_rank=2), "svd_rank", "svd"),
    (combining(pair(), "svd", svd_rank=0), "svd_rank", 0),
    (combining(pair(), "magnitude_prune", density=0.5, seed=1), "seed", "dare_linear"),
    (combining(unlike(rank=1), "linear"), "m", "one", "two", "cat", "svd"),
    (combining(unlike(shape=(6, 8))), "shape", "(6, 7)", "(6, 8)"),
    (combining(unlike(rank=5)), "m", 7, "(6, 7)", "svd"),
    (combining(unlike(magnitude=True)), "two", "m", "dora"),
    (combining(pair(config=None)), "two", "fully trained"),
    (combining(pair(start={"m": {"lora_a": jnp.ones(2)}})), "two", "m/lora_a", "quantized"),
    (combining(UNDER_TWO_PATHS), "params/m/kernel", "'m'", "'m/kernel'"),
    (combining(pair(), weights=[1.0]), "weights", 2, 1),
    (combining(pair(), weights=[1.0, math.nan]), "two", "nan"),
)


def test_parameters_trained_in_full_must_be_equal():
    adapters = pair()
    extras = {"params": {"head": {"kernel": jnp.ones((2, 2))}}}
    same = {name: a._replace(extras=extras) for name, a in adapters.items()}
    result = combine_adapters(same, [1, 1], "cat")
    assert result.extras is extras
    with pytest.raises(ValueError, match=mentions("params/head/kernel", "one", "two")):
        combine_adapters(adapters | {"two": same["two"]}, [1, 1], "cat")


def test_what_dare_keeps_is_divided_by_the_density():
    one = {"one": pair()["one"]}
    whole, kept = combining(one, "linear")(), combining(one, "dare_linear", density=0.5, seed=1)()
    for before, after in zip(*map(jax.tree.leaves, (whole.lora, kept.lora)), strict=True):
        stays = np.asarray(after) != 0
        assert 0 < stays.mean() < 1
        np.testing.assert_allclose(after[stays], 2 * before[stays], rtol=1e-6)
