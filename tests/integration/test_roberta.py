"""RoBERTa of its base size with random weights: `loraplus train` on its own files, and transformers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.adapter.tree import combine
from loraplus_jax.cli.commands import main
from loraplus_jax.inference.predict import load_tuned, predict_run

from .test_glue import write_lines

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("cache")]

RECIPE = Path(__file__).parents[2] / "configs/roberta_glue.yaml"
TEXTS = [f"A {kind} naïve film, №{n}: it isn't over." for n in range(8) for kind in ("good", "bad")]


def write_roberta(directory):
    """Config and sizes of FacebookAI/roberta-base, and a byte-level BPE of its layout, trained on a few texts."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers.models.roberta.modeling_roberta import RobertaPooler

    directory.mkdir()
    bpe: Any = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(TEXTS, vocab_size=400, special_tokens=special, show_progress=False)
    bpe.save_model(str(directory))  # vocab.json and merges.txt
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    bpe.save(str(directory / "tokenizer.json"))
    config = tf.RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    torch.manual_seed(0)
    model = tf.RobertaForMaskedLM(config)
    model.roberta.pooler = RobertaPooler(config)  # the published file has one
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms show in the outputs too
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    return model.num_parameters()


@pytest.mark.long
def test_a_step_of_the_recipe_and_its_export_equal_transformers(tmp_path):
    model = tmp_path / "roberta-base"
    assert write_roberta(model) == 125_288_025
    rows = [f"gj04\t{n % 2}\t\t{text}" for n, text in enumerate(TEXTS)]
    for name, part in {"train.tsv": rows[:8], "dev.tsv": rows[8:12]}.items():
        write_lines(tmp_path / "glue/CoLA", name, part)
    tests = [f"{n}\t{text}" for n, text in enumerate(TEXTS)]
    write_lines(tmp_path / "glue/CoLA", "test.tsv", ["index\tsentence", *tests])
    overrides = {
        "--model.path": model,
        "--model.pooling": "pooler",  # the head of RobertaForSequenceClassification
        "--data.path": "glue/cola",
        "--data.root": tmp_path / "glue",
        "--data.max_length": 32,
        "--data.validation_fraction": 0.25,
        "--optimizer.learning_rate": 1e-2,
        "--train.epochs": "null",
        "--train.steps": 1,
        "--train.batch_size": 2,
        "--train.eval_batch_size": 4,
        "--mesh.data": 1,
        "--output_dir": tmp_path / "run",
    }
    assert main(["train", str(RECIPE), *(str(x) for pair in overrides.items() for x in pair)]) == 0
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "merged"), "--merged"]) == 0
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tf.RobertaTokenizer.from_pretrained(model)(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    theirs = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = theirs.eval()(**inputs).logits.numpy()
    parts = load_tuned(tmp_path / "run").parts
    ids, mask = (jnp.asarray(value.numpy(), jnp.int32) for value in inputs.values())
    run, variables = jax.jit(parts.model.apply), combine(parts.trainable, parts.frozen)
    given = run(variables, ids, mask)
    base = run({**variables, "lora": jax.tree.map(jnp.zeros_like, variables["lora"])}, ids, mask)
    assert np.abs(given - base).max() > 1e-3, "the adapter does nothing"
    off = np.abs(given - wanted).max()
    print(f"logits up to {np.abs(wanted).max():.2f}, off by {off:.1e}")
    assert off <= 1e-4
    # The command's own tokens give the same: log probabilities are logits up to a constant.
    rows = predict_run(tmp_path / "run", data=str(tmp_path / "glue/CoLA/test.tsv"))
    found = np.log([[row["probabilities"][name] for name in ("0", "1")] for row in rows])
    np.testing.assert_allclose(np.diff(found), np.diff(wanted), atol=1e-4)
