"""Whole runs with other families: GPT-2 on its own files, tiny decoders of other kinds, and ModernBERT."""

import json

import pytest

from ..messages import assert_mentions
from ..models.checkpoints.gguf.files import gguf_of
from .language_world import gguf_tokenizer
from .properties import cells
from .runs import SHORT_TALK, assert_same_losses, evaluated, printed, tensor_bytes

pytestmark = pytest.mark.usefixtures("cache")

CELLS = """
            learns  resumes  devices  exports  restarts
gpt2        slow    -        long     slow     slow
gpt2_split  slow    -        -        long     -
gpt2_loftq  slow    -        -        slow     -
gemma3      long    -        -        long     -
olmo3       long    -        -        long     -
smollm3     long    -        -        long     -
qwen3_moe   slow    slow     slow     slow     long
mixtral     slow    long     -        long     -
mixtral_nf4 slow    -        -        slow     -
phi3        long    -        -        long     -
modernbert  slow    long     slow     slow     long
"""


@pytest.mark.parametrize(("kind", "prove"), cells(CELLS))
def test_kind(kind, prove, run_of, undrawn):
    prove(run_of(kind))


@pytest.fixture
def gpt2(run_of, undrawn):
    return run_of("gpt2").fresh()


@pytest.mark.long
def test_a_gguf_file_gives_the_run_of_its_directory_and_goes_out_again_in_blocks(
    gpt2, run_of, tmp_path, capsys
):
    end = json.loads((gpt2.model / "config.json").read_text())["eos_token_id"]
    path = gguf_of(gpt2.model, tmp_path / "base.gguf", **gguf_tokenizer(end, end))
    gpt2.trained(*SHORT_TALK, "--model.path", str(path))
    assert tensor_bytes(gpt2.out) == tensor_bytes(run_of("gpt2").straight)
    gguf = ("--format", "gguf", "--dtype", "q8_0")
    printed(capsys, "export", gpt2.out, "--to", tmp_path / "gguf", "--merged", *gguf)
    exact = evaluated(capsys, gpt2.out)["loss"]
    assert evaluated(capsys, tmp_path / "gguf")["loss"] == pytest.approx(exact, rel=5e-2)
    # A run on the file's blocks equals one on their values.
    stored = ("--model.path", str(tmp_path / "gguf/model.gguf"))
    wide = gpt2.trained(*SHORT_TALK, *stored, out=tmp_path / "wide")
    packed = gpt2.trained(*SHORT_TALK, *stored, "--model.quantize", "file", out=tmp_path / "packed")
    assert_same_losses(packed, wide)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        *(
            (
                ("--model.split_fused", layout, "--lora.target_modules", target),
                ("lora.target_modules", target.strip("[]"), "model.split_fused", "c_attn as q_attn", layout),
            )
            for layout, target in (("false", ".*(q|v)_attn"), ("true", "[c_attn]"))
        ),
        (("--data.template", "model"), ("no chat template", "data.template", "plain")),
        (("--data.max_length", "65"), ("data.max_length", 64, 65)),
    ],
)
def test_settings_of_another_model_are_named(gpt2, capsys, args, words):
    assert_mentions(gpt2.rejected(capsys, *args), *words)
    assert not gpt2.out.exists()
