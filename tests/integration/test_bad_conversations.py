"""Bad input to language models, as `test_bad_input` has it for encoders."""

import json

import numpy as np
import pytest

from . import language_world as tiny
from .test_bad_input import Case, assert_rejected, both, cut, json_fields, line, tensors, write

pytestmark = pytest.mark.usefixtures("cache")

QUERY = "model.layers.0.self_attn.q_proj.weight"
GGUF = "--model.path {dir}/tiny.gguf"
QUESTIONS = "--task multiple_choice --data.path {dir}/questions.jsonl"
NO_PROMPT = "--train.prompt null --train.prompt_tokens 64"
OWN = "--data.template {dir}/own.jinja"
SPEAK, EVAL = "generate {out} --prompt what", "eval {out}"
SWEEP = "sweep {dir}/config.yaml --output_dir {out}"
LAST = "--train.select last"
ASK = "generate {dir}/model --prompt what"


def gguf(name="tiny.gguf", **options):
    return lambda world: tiny.write_gguf_of(world.model, world.directory / name, **options)


def tools_in_the_third(world):
    rows = [{"messages": conversation(("user", f"what {n}"), ("assistant", "it"))} for n in range(60)]
    world.write_rows(
        "chats.jsonl", [row | {"tools": [{"name": "x"}] if n == 2 else None} for n, row in enumerate(rows)]
    )


def conversation(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def template(text):
    return write("own.jinja", text)


def unknown_role(world):
    """In the third of all conversations."""
    roles = ["user", "user", "usr", *["user"] * 60]
    rows = [conversation((role, f"what {n}"), ("assistant", "it")) for n, role in enumerate(roles)]
    world.write_rows("chats.jsonl", [{"messages": row} for row in rows])


def question(number=7, **fields):
    """Fields of a question replaced."""

    def spoil(world):
        lines = (world.directory / "questions.jsonl").read_text().splitlines()
        line(number, json.dumps(json.loads(lines[number - 1]) | fields), "questions.jsonl")(world)

    return spoil


PREPENDS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [9999], "tokens": ["<s>"]}},
}
Q5_0 = {"blk.0.ffn_up.weight": ("Q5_0", np.zeros((tiny.INNER, 22), np.uint8))}
CASES = [
    # GGUF files
    Case("GGUF of an unsupported quantisation", ("tiny.gguf", "Q5_0", "Q4_K"), GGUF, spoil=gguf(raw=Q5_0)),
    Case("GGUF truncated", ("tiny.gguf", "GGUF"), GGUF, spoil=both(gguf(), cut("tiny.gguf", 20_000))),
    Case(
        "GGUF without a chat template",
        ("tiny.gguf", "chat template", "data.template"),
        GGUF,
        spoil=gguf(**{"tokenizer.chat_template": None}),
    ),
    Case(
        "GGUF of one layer more than it has",
        ("num_hidden_layers", 3, 2),
        GGUF,
        spoil=gguf(**{"llama.block_count": 3}),
    ),
    # weights, sizes, tokenizer
    Case(
        "tensor missing",
        ("1 missing", f"- {QUERY.removeprefix('model.')} [32, 32]"),
        spoil=tensors(lambda t: t.pop(QUERY)),
    ),
    Case(
        "special token beyond the embedding",
        ("model", "'<s>'", 9999, "embedding"),
        spoil=json_fields("model/tokenizer.json", post_processor=PREPENDS),
    ),
    Case(
        "an encoder for instructions",
        ("model_type", "'bert'", "llama, mistral"),
        spoil=json_fields("model/config.json", model_type="bert"),
    ),
    Case(
        "a Llama for classification", ("model_type", "'llama'", "bert"), "--task classification " + NO_PROMPT
    ),
    # templates
    Case(
        "no chat template",
        ("model", "chat template", "plain"),
        spoil=json_fields("model/tokenizer_config.json", chat_template=None),
    ),
    Case(
        "template that writes for ever",
        ("own.jinja", "MiB of memory"),
        OWN,
        spoil=template("{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}"),
    ),
    Case(
        "template that reads what it must not",
        ("own.jinja", "__class__"),
        OWN,
        spoil=template("{{ messages.__class__.__mro__ }}"),
    ),
    # conversations
    Case("no answer tokens within max_length", ("max_length 8", "answer"), "--data.max_length 8"),
    Case("unknown role", ("chats.jsonl:3", "turn 1", "role", "usr", "'user'"), spoil=unknown_role),
    Case("a template without tools", ("chats.jsonl:3", "tools", "data.template"), spoil=tools_in_the_third),
    Case(
        "wrong columns",
        ("chats.jsonl", "asked, label", "instruction and output"),
        spoil=lambda world: world.write_rows("chats.jsonl", [{"asked": "a", "label": "b"}] * 60),
    ),
    Case(
        "column_names that are none of ours",
        ("data.column_names", "question"),
        '--data.column_names \'{{"question": "instruction"}}\'',
    ),
    Case(
        "column_names that the file lacks",
        ("chats.jsonl:1", "'instructions'", "'instruction'"),
        '--data.column_names \'{{"instruction": "instructions", "output": "output"}}\'',
    ),
    Case("max_length above the model's", ("data.max_length", 65, "64 tokens"), "--data.max_length 65"),
    Case(
        "batch larger than the packed rows",
        ("train.batch_size", 84, "rows"),
        "--data.packing true --data.max_length 64 --train.batch_size 84",
    ),
    # questions
    Case(
        "answer that is no choice",
        ("questions.jsonl:7", "'answer'", "'it is pink'"),
        QUESTIONS,
        spoil=question(answer="it is pink"),
    ),
    Case("conversations for multiple choice", ("chats.jsonl", "Answer format"), "--task multiple_choice"),
    # settings
    Case(
        "attention for a TPU",
        ("model.attention", "splash", "tpu", "cpu", "blocked"),
        "--model.attention splash",
    ),
    Case("prompt too long", ("prompt 1 of 1", "74 tokens", 56), f"--train.prompt '{'what ' * 60}'"),
    Case("answer longer than the model", ("answers", "64 tokens", 64), "--train.prompt_tokens 64"),
    Case(
        "a head of its own that a tied model lacks",
        ("lora.modules_to_save", "'lm_head'", "tied", "embed_tokens"),
        "--lora.modules_to_save [lm_head]",
        spoil=lambda world: tiny.write_model(world.model, tie_word_embeddings=True),
    ),
    # quantized bases
    Case("quantize unknown", ("model.quantize", "nf5", "nf4", "int8", "file"), "--model.quantize nf5"),
    Case("quantize file without one", ("model.quantize", "GGUF", "nf4"), "--model.quantize file"),
    Case("quantize for full", ("model.quantize", "method", "full"), "--model.quantize nf4 --method full"),
    Case(
        "quantize_exclude alone",
        ("model.quantize_exclude", "model.quantize"),
        "--model.quantize_exclude [o_proj]",
    ),
    Case(
        "quantize_exclude of nothing",
        ("model.quantize_exclude", "o_prj", "o_proj"),
        "--model.quantize nf4 --model.quantize_exclude [o_prj]",
    ),
    # starts from the base
    Case("sweep with a control of pissa", ("sweep.control", "false", "pissa"), SWEEP + " --lora.init pissa"),
    Case("sweep of lora_ga", ("lora.init", "lora_ga", "seed"), SWEEP + " --lora.init lora_ga"),
    Case(
        "sweep of ranks of pissa",
        ("sweep.ranks", "null", "pissa"),
        SWEEP + " --lora.init pissa --sweep.ranks [2,4]",
    ),
    # AdaLoRA
    Case(
        "ranks and the best state",
        ("optimizer.target_rank", "train.select", "last"),
        "--optimizer.target_rank 2",
    ),
    Case(
        "ranks of another optimizer",
        ("optimizer.target_rank", "optimizer.name", "adamw"),
        LAST + " --lora.rank 6 --optimizer.target_rank 2 --optimizer.name riemannian",
    ),
    Case(
        "target above the rank",
        ("optimizer.target_rank", "4", "5"),
        LAST + " --lora.rank 4 --optimizer.target_rank 5",
    ),
    # using it
    Case(
        "predict with a language model",
        ("out", "language model", "generate"),
        "predict {out} --text a",
        run=True,
    ),
    Case("eval of no split", ("'tests'", "'test'"), EVAL + " --split tests", run=True),
    Case(
        "eval of a file of another kind",
        ("conversations", "prompt, choices, answer"),
        EVAL + " --data {dir}/questions.jsonl",
        run=True,
    ),
    Case("temperature -1", ("temperature", -1.0), ASK + " --temperature -1"),
    Case("max_tokens 0", ("max_tokens", 0), ASK + " --max_tokens 0"),
    Case("max_tokens above the model's", ("answers", "64 tokens", 64), ASK + " --max_tokens 64"),
    Case("batch_size 0", ("batch_size", 0), ASK + " --batch_size 0"),
    Case("seed negative", ("seed", -1), ASK + " --temperature 1 --seed -1"),
    Case("a seed without a temperature", ("--seed", "--temperature"), ASK + " --seed 1"),
    Case("generate from nothing", ("--prompt", "--data"), "generate {dir}/model"),
    Case(
        "generate from both", ("--prompt TEXT or --data FILE", "not both"), ASK + " --data {dir}/chats.jsonl"
    ),
    Case("generate for an empty prompt", ("prompt", "empty"), "generate {dir}/model --prompt ' '"),
    Case(
        "generate for a prompt too long",
        ("prompt 1 of 1", "74 tokens", 54),
        f"generate {{dir}}/model --prompt '{'what ' * 60}' --max_tokens 10",
    ),
    Case(
        "system beside data",
        ("--system", "--prompt"),
        "generate {dir}/model --data {dir}/chats.jsonl --system a",
    ),
    Case("generate with a model that is none", ("model", "nowhere"), "generate nowhere --prompt a"),
    Case(
        "generate with an encoder",
        ("model_type", "'bert'"),
        ASK,
        spoil=json_fields("model/config.json", model_type="bert"),
    ),
    Case("a template for a run", ("--template", "--dtype", "run"), SPEAK + " --template plain", run=True),
    Case(
        "generate into a file that exists",
        ("old.jsonl",),
        ASK + " --output {dir}/old.jsonl",
        spoil=write("old.jsonl", "mine"),
    ),
    Case("generate with an unknown option", ("generate", "--topp 1"), ASK + " --topp 1"),
    Case(
        "generate with a base that changed",
        ("base.weights", "--allow_different base.weights"),
        SPEAK,
        spoil=tensors(lambda t: t[QUERY].__setitem__((0, 0), 1.0)),
        run=True,
    ),
]


# A finished run takes longer to make than all else here.
PARAMS = [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.run else []) for c in CASES]


@pytest.mark.parametrize("case", PARAMS)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    case, first_talk, request, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    home = request.getfixturevalue("finished_talk") if case.run else first_talk
    assert_rejected(case, home.copy(tmp_path), capsys)
