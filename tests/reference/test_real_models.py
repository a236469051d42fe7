"""The two real models, exported by the command's own function, in PEFT and in transformers."""

import jax
import numpy as np
import peft
import pytest
import torch
import transformers as tf

from loraplus_jax import LoRAPlusConfig, combine, save_adapter
from loraplus_jax.data.fetch import ASSETS, cache_dir
from loraplus_jax.data.options import DataOptions
from loraplus_jax.inference.export import export_run
from loraplus_jax.models.files import open_files
from loraplus_jax.models.options import ModelOptions
from loraplus_jax.settings.schema import Settings
from loraplus_jax.step.fingerprints import fingerprint
from loraplus_jax.tasks.causal_lm import LanguageTask
from loraplus_jax.tasks.encoder import EncoderTask
from loraplus_jax.training.setup import build_model, load_model

from .families import off, random

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("optimized"),
]
LIMIT = 1e-4
PLACES = {
    name: cache_dir() / ASSETS[name].directory / ASSETS[name].path for name in ("minilm", "smollm2-135m")
}


def needs(name):
    return pytest.mark.skipif(not PLACES[name].exists(), reason=f"loraplus fetch {name}")


def run_of(name, folder, targets, **model):
    """A run's adapter with random values, and its model here."""
    is_causal = name != "minilm"
    settings = Settings(
        model=ModelOptions(path=str(PLACES[name]), **model),
        data=DataOptions(max_length=16),
        lora=LoRAPlusConfig(target_modules=targets, rank=4),
        task="instruction" if is_causal else "classification",
        output_dir="-",
    )
    task = (
        LanguageTask(kind="instruction")
        if is_causal
        else EncoderTask(kind="classification", names=("no", "yes"))
    )
    files = open_files(PLACES[name])
    parts = load_model(settings, files, build_model(settings, files, task, settings.applied))
    parts = parts._replace(trainable=random(parts.trainable, 0, 0.05))
    notes = {"settings": settings.to_json(), "task": task.notes(), "base": fingerprint(parts.frozen)}
    save_adapter(folder / "adapter", parts.trainable, parts.specs, settings.applied, **notes)
    return parts


def ids(vocabulary):
    return np.random.default_rng(0).integers(5, vocabulary, (2, 12)).astype(np.int32)


def logits(model, given):
    with torch.no_grad():
        return model(torch.from_numpy(given).long(), attention_mask=torch.ones(given.shape)).logits.numpy()


@needs("minilm")
def test_minilm(tmp_path):
    parts = run_of("minilm", tmp_path, ("query", "value", "up"), pooling="pooler")
    given = ids(30000)
    variables = combine(parts.trainable, parts.frozen)
    ours = jax.jit(parts.model.apply)(variables, given, np.ones_like(given))
    export_run(tmp_path, tmp_path / "peft")
    export_run(tmp_path, tmp_path / "merged", merged=True)
    base = tf.AutoModelForSequenceClassification.from_pretrained(PLACES["minilm"], num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    assert off(ours, logits(theirs, given)) <= LIMIT
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert off(ours, logits(merged, given)) <= LIMIT
    assert merged.config.id2label == {0: "no", 1: "yes"}
    assert len(tf.AutoTokenizer.from_pretrained(tmp_path / "merged")("A film.").input_ids) == 5


@pytest.mark.long
@needs("smollm2-135m")
def test_smollm2(tmp_path):
    file = PLACES["smollm2-135m"]
    parts = run_of("smollm2-135m", tmp_path, ("q_proj", "k_proj", "v_proj", "o_proj"))
    given = ids(49000)
    variables = combine(parts.trainable, parts.frozen)
    ours = jax.jit(parts.model.apply)(variables, given)
    export_run(tmp_path, tmp_path / "peft")
    export_run(tmp_path, tmp_path / "merged", merged=True)
    base = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    wanted = logits(theirs, given)
    print(f"peft: off by {off(ours, wanted):.1e}")
    assert off(ours, wanted) <= LIMIT
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    found = logits(merged, given)
    print(f"merged: off by {off(ours, found):.1e}")
    assert off(ours, found) <= LIMIT
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    reference = tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("Hello 123, world!", "naïve   café\n\n x"):
        assert tokenizer(text).input_ids == reference(text).input_ids
    export_run(tmp_path, tmp_path / "gguf", merged=True, format="gguf", dtype="float32")
    again = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    assert off(ours, logits(again, given)) <= LIMIT
