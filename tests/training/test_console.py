"""What a run prints before training."""

import types

import pytest

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training.console import ignored_lines

from ..messages import assert_mentions

NO_SUCH = ("--lora.target_modules", "[nosuch]", "--lora.lr_ratio", "9")
DECAY = ("--optimizer.weight_decay", "0.1", "--optimizer.decay", "equal")
CHUNK = ("--task", "instruction", "--model.loss_chunk", "8")


@pytest.mark.parametrize(
    ("method", "options", "head", "words"),
    [
        ("lora_plus", (*NO_SUCH, *DECAY, *CHUNK), "lora", []),
        ("lora_plus", CHUNK, "params", ["model.loss_chunk"]),
        ("lora", (*NO_SUCH, *DECAY, *CHUNK), "lora", ["lora.lr_ratio", "optimizer.decay"]),
        ("full", (*NO_SUCH, *DECAY), "params", ["lora.*", "optimizer.decay"]),
        ("full", CHUNK, "params", ["lora.*", "optimizer.decay", "model.loss_chunk"]),
    ],
)
def test_what_the_method_or_a_trained_head_ignores_is_named(tmp_path, method, options, head, words):
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {path: d}\noutput_dir: o\n")
    settings = parse_settings(tmp_path / "c.yaml", ["--method", method, *options])
    config = types.SimpleNamespace(tie_word_embeddings=False)
    base = types.SimpleNamespace(model=types.SimpleNamespace(config=config))
    trainable = {head: {"lm_head" if head == "params" else "q_proj": 0.0}}
    lines = list(ignored_lines(settings, types.SimpleNamespace(base=base, trainable=trainable)))  # pyright: ignore
    assert len(lines) == len({word.partition(".")[0] == "model" for word in words})
    assert_mentions(" ".join(lines), *words)
