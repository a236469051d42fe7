"""Adapters here and in PEFT, and merged models in transformers, give the same logits."""

import jax
import numpy as np
import peft
import pytest
import torch
import transformers as tf

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, combine, init_lora, merge, split_trainable
from loraplus_jax.adapter.tree import flatten, replace_leaves
from loraplus_jax.inference.checkpoint_merge import CheckpointMerge
from loraplus_jax.inference.write_hf import write_hf
from loraplus_jax.interop.peft_files import load_peft, peft_config, save_peft
from loraplus_jax.models.checkpoints.params import check_params
from loraplus_jax.models.checkpoints.transformers_class import parameter_rules
from loraplus_jax.models.files import open_files

from .families import Pair, off, random

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LIMIT = 1e-4


def options(pair):
    """Options that PEFT has too, by name."""
    names = pair.linear
    some = (names[0], names[2])
    embedding = "embed_tokens" if pair.is_causal else "word"
    patterns = {"rank_pattern": {names[0]: 2, f".*/{names[-1]}": 5}, "alpha_pattern": {names[2]: 3.0}}
    return {
        "all_linear": {"target_modules": names},
        "embedding": {"target_modules": (*some, embedding)},
        "rslora": {"target_modules": names, "use_rslora": True, "alpha": 7.0},
        "patterns": {"target_modules": names, **patterns},
        "layers": {"target_modules": names, "layers_to_transform": (1,)},
        "modules_to_save": {"target_modules": some, "modules_to_save": (names[1],)},
        "parameters": {"target_parameters": {rf".*/{names[1]}/kernel": "lio"}},
        "experts": {"target_modules": names, "target_parameters": {".*/experts/.*": "leio"}},
        "init_b": {"target_modules": names, "init": "lora_b"},
        "dora": {"target_modules": names, "variant": "dora"},
        "bias": {"target_modules": names, "bias": "lora_only"},
        "all_biases": {"target_modules": names, "bias": "all", "variant": "dora", **patterns},
    }


def tuned(pair, seed=5, **fields):
    """A config, its model, random trained variables, and the base's others."""
    head = () if pair.is_causal else ("head",)
    fields["modules_to_save"] = (*fields.get("modules_to_save", ()), *head)
    config = LoRAPlusConfig(rank=4, **fields)
    model = apply_lora_plus(pair.model, config)
    lora, specs = init_lora(model, jax.random.key(0), *pair.inputs, base={"params": pair.params})
    trainable, frozen = split_trainable(
        {"params": pair.params, "lora": lora}, config.modules_to_save, bias=config.bias
    )
    trainable = random(trainable, seed)
    for key, spec in specs.items():
        if spec.layers is not None:
            leaf = trainable["lora"]
            for part in key.split("/"):
                leaf = leaf[part]
            keep = np.isin(np.arange(spec.shape[0]), spec.layers)[:, None, None]
            leaf |= {name: value * keep for name, value in leaf.items()}
    return config, model, specs, trainable, frozen


def write_merged(pair, folder, specs, trainable, *, headless=False, **how):
    """The directory of the pair's model with the adapter merged into its weights."""
    new = () if pair.is_causal else ("head",)
    leaves, _ = check_params(open_files(pair.folder), pair.table, pair.params, new=new)
    extras = {name: x for name, x in trainable.items() if name != "lora"}
    has_head = not (headless or pair.is_causal)
    head = {"params": {"head": extras["params"]["head"]}} if has_head else {}
    folder.mkdir()
    made = CheckpointMerge(pair.table, leaves, specs, trainable["lora"], extras)
    labels = {"num_labels": 3} if has_head else {}
    write_hf(folder, open_files(pair.folder), made, pair.form, new=head, config=labels, **how)


# A cell for each name table and each option.
CELLS = {
    "llama3": "modules_to_save",
    "smollm2": "embedding",
    "qwen2": "all_biases",
    "qwen3": "layers",
    "biases": "bias",
    "gemma2": "parameters",
    "gemma3": "init_b",
    "olmo2": "all_linear",
    "olmo3": "rslora",
    "smollm3": "layers",
    "qwen3_moe": "experts",
    "mixtral": "experts",
    "phi3": "rslora",
    "phi3_split": "patterns",
    "gpt2": "all_linear",
    "gpt2_split": "dora",
    "bert": "all_biases",
    "roberta": "embedding",
    "modernbert": "rslora",
}


@pytest.mark.parametrize(("name", "option"), CELLS.items())
def test_exported_and_merged_adapters_give_the_same_logits(name, option, pairs, tmp_path):
    pair = pairs(name)
    config, model, specs, trainable, frozen = tuned(pair, **options(pair)[option])
    given = pair.logits(model, combine(trainable, frozen))
    extras = {k: v for k, v in trainable.items() if k != "lora"}
    if name == "roberta":  # a part of the classifier there, frozen here
        extras["params"] = extras["params"] | {"pooler": pair.params["pooler"]}
    save_peft(
        tmp_path / "a",
        trainable["lora"],
        specs,
        config,
        pair.path_map,
        extras=extras,
        task_type=pair.form.task_type,
    )
    loaded = peft.PeftModel.from_pretrained(pair.reference(), tmp_path / "a").eval()
    wanted = pair.torch_logits(loaded)
    assert off(pair.base_logits, wanted) > 1e-2, "the adapter does nothing"
    assert off(given, wanted) <= LIMIT
    # And back, to the bit, unless parts of a module have different scales.
    again = load_peft(tmp_path / "a", specs, pair.path_map, params=pair.params)
    assert again.config == config
    rel = 1e-6 if (name, option) == ("phi3_split", "patterns") else 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rel), again.lora, trainable["lora"])
    jax.tree.map(np.testing.assert_array_equal, again.extras, extras)
    if option == "parameters":  # whose layers are no stack
        return
    # Merged, in several files.
    write_merged(pair, tmp_path / "merged", specs, trainable, shard_bytes=40_000)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    auto = tf.AutoModelForCausalLM if pair.is_causal else tf.AutoModelForSequenceClassification
    merged, report = auto.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(merged).__name__ == pair.form.architecture
    assert off(given, pair.torch_logits(merged.eval())) <= LIMIT


def test_a_bare_encoder_in_transformers(tmp_path):
    pair = Pair("bert", tmp_path / "base", pooling="mean")
    _, model, specs, trainable, frozen = tuned(pair, target_modules=pair.linear)
    write_merged(pair, tmp_path / "merged", specs, trainable, headless=True)
    theirs = tf.AutoModel.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    given = {
        n: torch.from_numpy(x).long()
        for n, x in zip(("input_ids", "attention_mask"), pair.inputs, strict=True)
    }
    with torch.no_grad():
        hidden = theirs(**given).last_hidden_state.numpy()
    mask = pair.inputs[1][:, :, None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    head = trainable["params"]["head"]
    wanted = mean @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert off(pair.logits(model, combine(trainable, frozen)), wanted) <= LIMIT


def test_weights_are_stored_as_asked_and_merged_in_float32(pairs, tmp_path):
    pair = pairs("llama3")
    _, _, specs, trainable, _ = tuned(pair, target_modules=pair.linear)
    write_merged(pair, tmp_path / "merged", specs, trainable, dtype=np.dtype(jax.numpy.bfloat16))
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    whole = merge({"params": pair.params}, trainable["lora"], specs, dtype="bfloat16")
    ours = np.asarray(whole["params"]["layers"]["mlp"]["up_proj"]["kernel"][1].astype("float32"))
    given = theirs.model.layers[1].mlp.up_proj.weight.detach().float().numpy().T
    # The two sums may round apart in the last bit before they are stored.
    assert np.mean(ours != given) < 1e-2
    np.testing.assert_allclose(ours, given, rtol=1e-2)


# What PEFT's user sets, in PEFT's names; modules by ours. Each option once.
THEIRS = {
    "llama3": {"use_rslora": True, "lora_alpha": 7, "layers_to_transform": [1]},
    "phi3": {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}},
    "gpt2": {"embedding": True, "ensure_weight_tying": True},
    "gpt2_split": {"use_dora": True},
    "bert": {"bias": "all"},
    # Of a mixture the parameters within one module are wrapped around each other.
    "qwen3_moe": {"target_parameters": ["mlp.experts.gate_up_proj"], "rank_pattern": {"mlp.experts": 2}},
    "mixtral": {
        "target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        "target_modules": [],
    },
}


def made_by_peft(pair, options, folder):
    """An adapter that PEFT saved, and its model."""
    given = dict(options)
    names = [*pair.theirs[:3]]
    if given.pop("embedding", False):
        # PEFT looks for the names embed_tokens and lm_head.
        names += [pair.theirs[3], "lm_head"] if pair.name.startswith("gpt2") else [pair.theirs[3]]
    given = {"target_modules": names, "r": 4, "lora_alpha": 16, "task_type": pair.form.task_type} | given
    model = peft.get_peft_model(pair.reference(), peft.LoraConfig(**given)).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or (parameter.requires_grad and parameter.ndim == 1):
                parameter.copy_(torch.from_numpy(0.3 * rng.normal(size=parameter.shape)))
            elif "modules_to_save" in name:
                parameter.add_(torch.from_numpy(0.3 * rng.normal(size=parameter.shape)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", THEIRS)
def test_adapters_that_peft_made_give_the_same_logits_here(name, pairs, tmp_path):
    pair = pairs(name)
    theirs = made_by_peft(pair, THEIRS[name], tmp_path / "a")
    config = peft_config(
        tmp_path / "a",
        pair.path_map,
        layers=pair.model.config.num_hidden_layers,
        target_parameters=parameter_rules(pair.table),
    )
    model = apply_lora_plus(pair.model, config)
    _, specs = init_lora(model, jax.random.key(0), *pair.inputs, base={"params": pair.params})
    adapter = load_peft(tmp_path / "a", specs, pair.path_map, params=pair.params)
    variables = replace_leaves({"params": pair.params, "lora": adapter.lora}, flatten(adapter.extras))
    given, wanted = pair.logits(model, variables), pair.torch_logits(theirs)
    assert off(pair.base_logits, wanted) > 1e-2, "the adapter does nothing"
    assert off(given, wanted) <= LIMIT


def test_layers_of_a_stack_with_ranks_of_their_own_are_rejected(pairs, tmp_path):
    pair = pairs("llama3")
    config = peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"layers.0.*": 2}, task_type="CAUSAL_LM")
    peft.get_peft_model(pair.reference(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"ranks.*alphas"):
        peft_config(tmp_path / "a", pair.path_map, layers=2)


def test_an_embedding_that_peft_adapts_without_the_tied_head_is_rejected(pairs, tmp_path):
    pair = pairs("smollm2")
    config = peft.LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    peft.get_peft_model(pair.reference(), config).save_pretrained(tmp_path / "a")
    ours = LoRAPlusConfig(target_modules=["embed_tokens"], rank=8, alpha=8.0)
    _, specs = init_lora(apply_lora_plus(pair.model, ours), jax.random.key(0), *pair.inputs)
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        load_peft(tmp_path / "a", specs, pair.path_map, params=pair.params)


def test_a_fully_trained_embedding_is_the_tied_head_on_both_sides(pairs, tmp_path):
    pair = pairs("gpt2")
    saved = {"modules_to_save": [pair.theirs[3], "lm_head"], "ensure_weight_tying": True}
    theirs = made_by_peft(pair, saved, tmp_path / "theirs")
    wanted = pair.torch_logits(theirs)
    config = peft_config(tmp_path / "theirs", pair.path_map, layers=pair.model.config.num_hidden_layers)
    model = apply_lora_plus(pair.model, config)
    _, specs = init_lora(model, jax.random.key(0), *pair.inputs, base={"params": pair.params})
    adapter = load_peft(tmp_path / "theirs", specs, pair.path_map, params=pair.params)
    variables = replace_leaves({"params": pair.params, "lora": adapter.lora}, flatten(adapter.extras))
    assert off(pair.logits(model, variables), wanted) <= 1e-5
    save_peft(tmp_path / "ours", adapter.lora, specs, config, pair.path_map, extras=adapter.extras)
    loaded = peft.PeftModel.from_pretrained(pair.reference(), tmp_path / "ours").eval()
    assert off(pair.torch_logits(loaded), wanted) <= 1e-5
    with loaded.disable_adapter():  # the base's own head is untouched
        assert off(pair.torch_logits(loaded), pair.base_logits) <= 1e-5
    made_by_peft(pair, {"modules_to_save": [pair.theirs[3]]}, tmp_path / "untied")
    with pytest.raises(ValueError, match=r"ensure_weight_tying"):
        peft_config(tmp_path / "untied", pair.path_map)


def test_an_adapted_embedding_with_a_scale_of_its_own_is_the_tied_head_in_peft(pairs, tmp_path):
    """PEFT takes the head's scale by the head's name."""
    pair = pairs("smollm2")
    rules = {"rank_pattern": {"embed_tokens": 2}, "alpha_pattern": {"embed_tokens": 3.0}}
    config, model, specs, trainable, frozen = tuned(
        pair, target_modules=("embed_tokens", pair.linear[0]), **rules
    )
    save_peft(tmp_path / "a", trainable["lora"], specs, config, pair.path_map)
    loaded = peft.PeftModel.from_pretrained(pair.reference(), tmp_path / "a").eval()
    wanted = pair.torch_logits(loaded)
    assert off(pair.base_logits, wanted) > 1e-2
    assert off(pair.logits(model, combine(trainable, frozen)), wanted) <= 1e-5
    with loaded.disable_adapter():
        assert off(pair.torch_logits(loaded), pair.base_logits) <= 1e-5


def test_an_embedding_whose_tied_head_peft_does_not_find_is_rejected(pairs, tmp_path):
    pair = pairs("gpt2")
    given = {"target_modules": ["wte"], "ensure_weight_tying": True}
    made_by_peft(pair, given, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"lm_head.*transformer\.wte.*lm_head in target_modules"):
        peft_config(tmp_path / "theirs", pair.path_map)
