"""NNX models and trainers of other packages: tunix with our adapters and with qwix's.

`.ci/run` installs the packages; where one is missing its tests are skipped.
"""

import functools
import runpy
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig, lora_plus, lora_plus_adamw
from loraplus_jax.interop import TUNIX_LLAMA
from loraplus_jax.nnx import apply_lora_plus, check_reads, lora_tree, set_lora, specs_of
from loraplus_jax.nnx import merge as merge_model

from .harness import RATIO, assert_close, assert_ratio, drawn, to_peft_and_back

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

IDS = jnp.arange(16).reshape(2, 8)
POSITIONS = jnp.broadcast_to(jnp.arange(8), (2, 8))
MASK = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (2, 8, 8))
RATE = 1e-3
SIZES = {"num_layers": 2, "vocab_size": 64, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8}
SIZES |= {"num_kv_heads": 1, "rope_theta": 10_000, "norm_eps": 1e-6}


def tunix_model(family, **options):
    models = pytest.importorskip(f"tunix.models.{family}.model")
    config = models.ModelConfig(**SIZES | options)
    model = {"qwen3": "Qwen3", "llama3": "Llama3", "qwen2": "Qwen2"}[family]
    made = getattr(models, model)(config, rngs=nnx.Rngs(0))
    nnx.update(made, drawn(nnx.state(made, nnx.Param)))  # tunix starts some weights at zero
    return made


def logits(model):
    return model(IDS, POSITIONS, None, MASK)[0]


def train(model, tx, steps, directory=None, **options):
    """tunix's own trainer, after so many steps on the same batch."""
    from tunix.sft import peft_trainer

    def loss_fn(model, input_tokens, positions, attention_mask):
        rows, _ = model(input_tokens, positions, None, attention_mask)
        return optax.softmax_cross_entropy_with_integer_labels(rows[:, :-1], input_tokens[:, 1:]).mean()

    def inputs(batch):
        return {"input_tokens": batch.input_tokens, "positions": POSITIONS, "attention_mask": MASK}

    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100, max_steps=steps, checkpoint_root_directory=directory, **options
    )
    trainer = peft_trainer.PeftTrainer(model, tx, config)
    trainer = trainer.with_loss_fn(loss_fn).with_gen_model_input_fn(inputs)
    batch = peft_trainer.TrainingInput(input_tokens=IDS, input_mask=jnp.ones_like(IDS, bool))
    trainer.train([batch] * steps * options.get("gradient_accumulation_steps", 1), None)
    trainer.close()
    return trainer


def adamw(**options):
    """Injected, as tunix reads the rate for its log from `hyperparams`."""
    return optax.inject_hyperparams(lora_plus_adamw)(learning_rate=RATE, lr_ratio=RATIO, **options)


CONFIG = LoRAPlusConfig(target_modules=["q_proj", "v_proj", "o_proj", "gate_proj"], rank=2, lr_ratio=RATIO)


@pytest.mark.parametrize("family", ["qwen3", "llama3", "qwen2"])
def test_tunix_trains_our_adapters_and_a_peft_directory_comes_out(family, tmp_path):
    model = tunix_model(family)
    plain = logits(model)
    specs = apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(logits(model), plain)
    check_reads(model, IDS, POSITIONS, None, MASK)
    set_lora(model, drawn(lora_tree(model)))
    before = lora_tree(model)
    train(model, adamw(), 1)
    assert_ratio(before, lora_tree(model), len(specs))
    assert_close(logits(model), logits(merge_model(model)), 2e-5)
    to_peft_and_back(tmp_path / "peft", lora_tree(model), specs, CONFIG, TUNIX_LLAMA)


MIXTURES = {  # grouped by ragged_dot, after moves of axes; a loop over experts
    "gemma4.moe MoERagged": {"gating_einsum": "eooi", "linear": "eio"},
    "qwen3.model MoELayer": {"(gate|up|down)_proj": "eio"},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_tunix_s_experts_have_thin_products_and_the_merged_values(name):
    place, kind = name.split()
    sizes = {"embed_dim": 8, "expert_dim": 16, "hidden_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    mesh = types.SimpleNamespace(exp_weight_edf=None, exp_weight_efd=None)
    config = types.SimpleNamespace(**sizes, param_dtype=jnp.float32, dtype=jnp.float32, shd_config=mesh)
    model = getattr(pytest.importorskip(f"tunix.models.{place}"), kind)(config, rngs=nnx.Rngs(0))
    nnx.update(model, drawn(nnx.state(model, nnx.Param)))
    x = jnp.sin(jnp.arange(96.0)).reshape(2, 6, 8)
    plain = model(x)
    rules = LoRAPlusConfig(target_parameters=MIXTURES[name], rank=2)
    apply_lora_plus(model, rules, rngs=nnx.Rngs(1))
    assert_close(model(x), plain, 1e-6)
    assert check_reads(model, x) == {}
    set_lora(model, drawn(lora_tree(model)))
    assert_close(model(x), merge_model(model)(x), 1e-5)


def test_tunix_accumulates_and_resumes(tmp_path):
    ends = []
    for runs in ((4,), (2, 4)):
        model = tunix_model("qwen3")
        apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))
        for steps in runs:
            root = str(tmp_path / f"{len(runs)}")
            train(model, adamw(), steps, root, gradient_accumulation_steps=2)
        ends.append(lora_tree(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *ends)


@pytest.mark.parametrize(
    ("tx", "logged"),
    [
        (lora_plus_adamw(RATE, RATIO), False),
        (lora_plus(optax.adam(RATE), RATIO), False),
        (lora_plus(optax.inject_hyperparams(optax.adam)(RATE), RATIO), True),
        (optax.inject_hyperparams(lora_plus_adamw)(optax.linear_schedule(0, RATE, 1), RATIO), True),
    ],
)
def test_tunix_logs_injected_rates(tx, logged):
    model = tunix_model("qwen3")
    specs = apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))
    set_lora(model, drawn(lora_tree(model)))
    before = lora_tree(model)
    log = train(model, tx, 2).metrics_logger
    assert_ratio(before, lora_tree(model), len(specs), rel=0.2)
    assert log.metric_exists("", "learning_rate", "train") == logged
    if logged:
        assert log.get_metric_history("", "learning_rate", "train")[-1] == pytest.approx(RATE)


def dequantized(model):
    """The weights that qwix quantized, by path."""
    qarray = pytest.importorskip("qwix._src.core.qarray")
    leaves = {path: value[...] for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    found = {path[:-2]: value for path, value in leaves.items() if path[-2:] == ("array", "qvalue")}
    scales = {path: leaves[(*path, "array", "scale")] for path in found}
    kind = lambda value: "nf4" if value.dtype == jnp.uint4 else "int8"  # noqa: E731
    return {
        path: qarray.dequantize(qarray.QArray(value, scales[path], qtype=kind(value)))
        for path, value in found.items()
    }


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("llama3", {"weight_qtype": "nf4", "tile_size": 8}),
        ("llama3", {"weight_qtype": "int8"}),
    ],
)
def test_the_adapters_of_qwix_in_tunix(family, options, tmp_path):
    qwix = pytest.importorskip("qwix")
    model = tunix_model(family)
    rule = {"module_path": ".*(q_proj|v_proj|o_proj|gate_proj)", "rank": 2, "alpha": 4.0}
    provider = qwix.LoraProvider(**rule | options)
    model = qwix.apply_lora_to_model(model, provider, IDS, POSITIONS, None, MASK, rngs=nnx.Rngs(1))
    for _path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.LoRAParam):
            variable[...] = drawn({"x": variable[...]})["x"]
    before = specs_of(model, scale=2.0)
    train(model, adamw(), 1)
    lora, specs, config = specs_of(model, scale=2.0)
    assert_ratio(before.lora, lora, len(specs))
    to_peft_and_back(tmp_path / "peft", lora, specs, config, TUNIX_LLAMA)
    # Our adapters with the same factors and weights give the same logits.
    ours = tunix_model(family)
    for path, value in dequantized(model).items():
        weight = functools.reduce(
            lambda m, part: m[part] if isinstance(part, int) else getattr(m, part), path, ours
        )
        weight[...] = value
    apply_lora_plus(ours, config, rngs=nnx.Rngs(2))
    set_lora(ours, lora)
    assert_close(logits(ours), logits(model), 1e-4)


def test_the_example_of_tunix_learns_and_resumes_to_the_same_factors():
    pytest.importorskip("tunix")
    example = Path(__file__).parents[2] / "examples/08_tunix.py"
    before, after, difference = runpy.run_path(str(example))["main"]()
    assert after < 0.9 * before
    assert difference == 0
