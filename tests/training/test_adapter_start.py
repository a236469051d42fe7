"""What cannot start from the base is an error before anything is written; whole runs are in `tests/integration`."""

import pytest

from ..messages import assert_mentions


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--lora.init", "pissa", "--model.quantize", "nf4"),
            ("lora.init", "pissa", "model.quantize", "loftq"),
        ),
        (("--lora.init", "loftq"), ("lora.init", "loftq", "model.quantize", "nf4", "int8")),
        (
            ("--lora.init", "loftq", "--model.quantize", "nf4", "--model.quantize_exclude", "[q_proj]"),
            ("lora.init", "loftq", "q_proj", "quantize_exclude"),
        ),
        (("--lora.init", "olora", "--init_adapter", "{dir}"), ("lora.init", "olora", "init_adapter")),
        (("--lora.init", "lora", "--lora.init_iterations", "2"), ("init_iterations", "lora")),
        (("--lora.init", "pissa", "--lora.rank", "12"), ("lora.rank", "8", "pissa", "12", "twice")),
        (
            ("--lora.init", "pissa", "--lora.layers_to_transform", "[1]"),
            ("lora.layers_to_transform", "pissa"),
        ),
        (("--lora.init", "orthogonal", "--lora.rank", "3"), ("lora.rank", "even", "3")),
    ],
)
def test_bad_settings(talk, capsys, flags, words):
    assert talk.train(*(flag.format(dir=talk.directory) for flag in flags)) == 2
    assert_mentions(capsys.readouterr().err, *words)
    assert not talk.out.exists()
