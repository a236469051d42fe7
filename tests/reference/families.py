"""Random models of every family, in transformers and here, with the same weights."""

import copy
import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as tf

from loraplus_jax.models.checkpoints import transformers_class
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.families import encoder_of, family_of
from loraplus_jax.models.files import open_files


def golden_maker(name):
    path = Path(__file__).parents[1] / "golden" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker, gpt2_maker = golden_maker("make_llama"), golden_maker("make_gpt2")
CAUSAL = (
    *("llama3", "smollm2", "qwen2", "qwen3", "biases", "gemma2", "gemma3", "phi3"),
    *("olmo2", "olmo3", "smollm3", "qwen3_moe", "mixtral"),
    *("gpt2", "gpt2_split", "phi3_split"),
)
LINEAR = {
    "causal": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "encoder": ("query", "key", "value", "out", "up", "down"),
    "gpt2": ("c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"),
    "gpt2_split": ("q_attn", "mlp/c_fc", "v_attn", "k_attn", "mlp/c_proj"),
    "mixture": ("q_proj", "k_proj", "v_proj", "o_proj", "mlp/gate"),
    "modernbert": ("query", "key", "value", "out", "up", "gate", "down"),
    "phi3_split": ("q_proj", "down_proj", "v_proj", "up_proj", "gate_proj", "k_proj"),
}
# Three kinds of modules and the embedding, in PyTorch's names.
THEIRS = {
    "causal": ("q_proj", "v_proj", "down_proj", "embed_tokens"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "embed_tokens"),
    "encoder": ("query", "value", "intermediate.dense", "word_embeddings"),
    "gpt2": ("c_attn", "attn.c_proj", "c_fc", "wte"),
    "mixture": ("q_proj", "v_proj", "o_proj", "embed_tokens"),
    "modernbert": ("Wqkv", "attn.Wo", "Wi", "tok_embeddings"),
}
SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}


class Pair:
    """One model on both sides.

    Attributes:
      folder: its directory.
      model, params, table, form: here.
      inputs: what ours is called with.
      linear, theirs: names of modules here and there, see `LINEAR` and `THEIRS`; with fused ones as their parts if
        the name ends in `_split`.
    """

    def __init__(self, name, folder, pooling="pooler"):
        self.name, self.folder, self.is_causal = name, folder, name in CAUSAL
        kind = name if name in LINEAR else "causal" if self.is_causal else "encoder"
        kind = "mixture" if name in ("qwen3_moe", "mixtral") else kind
        self.linear, self.theirs = LINEAR[kind], THEIRS[kind.removesuffix("_split")]
        name, split_fused = name.removesuffix("_split"), name.endswith("_split")
        torch.manual_seed(0)
        reference = (
            gpt2_maker.make(gpt2_maker.CASES["tied"])
            if name == "gpt2"
            else maker.make(*maker.CASES[name])
            if self.is_causal
            else encoder(name)
        )
        reference.save_pretrained(folder)
        if self.is_causal:
            entries = open_files(folder).config
            family = family_of(entries["model_type"])
            config = dataclasses.replace(family.config.from_hf(entries), split_fused=split_fused)
            self.model, self.table = family.model(config), family.name_table(config)
            self.form, new = transformers_class.causal_lm_class(config), ()
        else:
            entries = open_files(folder).config
            family = encoder_of(entries["model_type"])
            config = family.config.from_hf(entries)
            self.model, self.table = family.model(config, 3, pooling), family.name_table(config, pooling)
            self.form = transformers_class.encoder_class(config, pooling)
            new = ("head",)
        self.inputs = inputs(self.is_causal)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), *self.inputs)["params"]
        self.params = load_params(open_files(folder), self.table, shapes, new=new)
        for part in new:
            self.params[part] = random(shapes[part], 7)
        self.path_map = transformers_class.path_map(self.table, self.form)
        self.base_logits = self.logits(self.model, {"params": self.params})
        extra = {} if self.is_causal else {"num_labels": 3}
        self._reference = (
            self.torch_class().from_pretrained(folder, attn_implementation="eager", **extra).eval()
        )

    def torch_class(self):
        return getattr(tf, self.form.architecture)

    def reference(self):
        """The base in transformers, of which PEFT makes something else."""
        return copy.deepcopy(self._reference)

    def logits(self, model, variables):
        """Ours, zero at padding."""
        given = np.asarray(jax.jit(model.apply)(variables, *self.inputs))
        return np.where(self.inputs[1][:, :, None], given, 0) if self.is_causal else given

    def torch_logits(self, model):
        names = ("input_ids", "attention_mask")
        given = {n: torch.from_numpy(x).long() for n, x in zip(names, self.inputs, strict=True)}
        with torch.no_grad():
            out = model(**given).logits.numpy()
        return np.where(self.inputs[1][:, :, None], out, 0) if self.is_causal else out


def inputs(is_causal):
    rng = np.random.default_rng(3)
    ids = rng.integers(5, 90, (3, 14)).astype(np.int32)
    mask = (np.arange(14) < np.array([14, 9, 3])[:, None]).astype(np.int32)
    padding = 0 if is_causal else 1
    return np.where(mask, ids, padding).astype(np.int32), mask


def encoder(name):
    config = {
        "bert": lambda: tf.BertConfig(**SIZES, type_vocab_size=2, pad_token_id=1),
        "roberta": lambda: tf.RobertaConfig(**SIZES, type_vocab_size=1, layer_norm_eps=1e-5),
        # A window of three tokens on either side, and of its layers the second and third have one.
        "modernbert": lambda: tf.ModernBertConfig(**SIZES, pad_token_id=1, local_attention=6),
    }[name]()
    model = {"bert": tf.BertModel, "roberta": tf.RobertaModel}.get(name, tf.ModernBertForMaskedLM)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def random(tree, seed, size=0.3):
    """Random values in the shapes of a tree: no factor is zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(size * rng.normal(size=x.shape), jnp.float32) for x in leaves])


def off(given, wanted):
    """The largest difference, relative to the largest value."""
    return float(np.abs(given - wanted).max() / np.abs(wanted).max())
