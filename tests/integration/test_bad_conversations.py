"""Bad input to language models, as `test_bad_input` has it for encoders."""

import json

import numpy as np
import pytest

from . import language_world as tiny
from .test_bad_input import (
    Case,
    assert_rejected,
    both,
    config,
    cut,
    json_fields,
    line,
    remove,
    tensors,
    write,
)

pytestmark = pytest.mark.usefixtures("cache")

QUERY = "model.layers.0.self_attn.q_proj.weight"
GGUF = ("--model.path", "{dir}/tiny.gguf")
QUESTIONS = ("--task", "multiple_choice", "--data.path", "{dir}/questions.jsonl")
NO_PROMPT = ("--train.prompt", "null", "--train.prompt_tokens", "64")
OWN = ("--data.template", "{dir}/own.jinja")
SPEAK, EVAL = ("generate", "{out}", "--prompt", "what"), ("eval", "{out}")
ASK = ("generate", "{dir}/model", "--prompt", "what")


def gguf(name="tiny.gguf", **options):
    return lambda world: tiny.write_gguf_of(world.model, world.directory / name, **options)


def two_files(world):
    (world.directory / "both").mkdir()
    gguf("both/one.gguf")(world)
    gguf("both/two.gguf")(world)


def ghost_shard(world):
    (world.model / "model.safetensors").rename(world.model / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {QUERY: "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    }
    (world.model / "model.safetensors.index.json").write_text(json.dumps(index))


def third_answer(tools=None, **fields):
    """Every row a conversation, with tools in the third and more fields in its answer."""

    def spoil(world):
        content = []
        for n in range(60):
            answer = {"role": "assistant", "content": "it"} | (fields if n == 2 else {})
            messages = [{"role": "user", "content": f"what {n}"}, answer]
            content.append({"messages": messages, "tools": tools if n == 2 else None})
        world.write_rows("chats.jsonl", content)

    return spoil


def template(text):
    return write("own.jinja", text)


def all_said(*turns):
    """Every row a conversation, these turns in the third."""

    def spoil(world):
        good = [("user", "what"), ("assistant", "it")]
        rows = [good, good, turns, *[[("user", f"what {n}"), ("assistant", "it")] for n in range(60)]]
        content = [{"messages": [{"role": r, "content": t} for r, t in row]} for row in rows]
        world.write_rows("chats.jsonl", content)

    return spoil


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
    Case(
        "GGUF of another architecture",
        ("tiny.gguf", "'gptneox'", "llama, qwen2, qwen3, gemma2, gemma3"),
        GGUF,
        gguf(arch="gptneox"),
    ),
    Case("GGUF of an unsupported quantisation", ("tiny.gguf", "Q5_0", "Q4_K"), GGUF, gguf(raw=Q5_0)),
    Case("GGUF truncated", ("tiny.gguf", "GGUF"), GGUF, both(gguf(), cut("tiny.gguf", 20_000))),
    Case("GGUF cut in its header", ("tiny.gguf", "90 bytes"), GGUF, both(gguf(), cut("tiny.gguf", 90))),
    Case("GGUF empty", ("tiny.gguf", "empty"), GGUF, write("tiny.gguf", "")),
    Case("GGUF that is none", ("tiny.gguf", "b'hell'"), GGUF, write("tiny.gguf", "hello" * 9)),
    Case(
        "two GGUF files in a directory",
        (2, "GGUF", "one.gguf, two.gguf"),
        ("--model.path", "{dir}/both"),
        two_files,
    ),
    Case(
        "GGUF without a tokenizer",
        ("tiny.gguf", "tokenizer"),
        GGUF,
        gguf(**{"tokenizer.ggml.tokens": None}),
    ),
    Case(
        "GGUF without a chat template",
        ("tiny.gguf", "chat template", "data.template"),
        GGUF,
        gguf(**{"tokenizer.chat_template": None}),
    ),
    Case(
        "GGUF of one layer more than it has",
        ("num_hidden_layers", 3, 2),
        GGUF,
        gguf(**{"llama.block_count": 3}),
    ),
    # weights, sizes, tokenizer
    Case(
        "tensor missing",
        ("1 missing", f"- {QUERY.removeprefix('model.')} [32, 32]"),
        spoil=tensors(lambda t: t.pop(QUERY)),
    ),
    Case(
        "tensor extra",
        ("1 extra", "+ model.layers.0.x [3]"),
        spoil=tensors(lambda t: t.update({"model.layers.0.x": np.ones(3, np.float32)})),
    ),
    Case(
        "tensor misshapen",
        ("misshapen", f"~ {QUERY} is [32, 8]"),
        spoil=tensors(lambda t: t.update({QUERY: np.ones((32, 8), np.float32)})),
    ),
    Case("shard missing", ("model-00002-of-00002.safetensors", "missing"), spoil=ghost_shard),
    Case(
        "tokenizer larger than the embedding",
        ("model", "embedding", "300 rows"),
        spoil=json_fields("model/config.json", vocab_size=300),
    ),
    Case(
        "special token beyond the embedding",
        ("model", "'<s>'", 9999, "embedding"),
        spoil=json_fields("model/tokenizer.json", post_processor=PREPENDS),
    ),
    Case("tokenizer.json missing", ("model", "tokenizer.json"), spoil=remove("model/tokenizer.json")),
    Case(
        "rotary scaling of an unknown type",
        ("config.json", "rope_scaling", "'yarrn'", "'yarn'"),
        spoil=json_fields("model/config.json", rope_scaling={"rope_type": "yarrn", "factor": 2.0}),
    ),
    Case(
        "an encoder for instructions",
        ("model_type", "'bert'", "llama, mistral"),
        spoil=json_fields("model/config.json", model_type="bert"),
    ),
    Case(
        "a Llama for classification",
        ("model_type", "'llama'", "bert"),
        ("--task", "classification", *NO_PROMPT),
    ),
    Case(
        "key heads that do not divide the heads",
        ("num_key_value_heads", 3, 4),
        spoil=json_fields("model/config.json", num_key_value_heads=3),
    ),
    # templates
    Case(
        "no chat template",
        ("model", "chat template", "plain"),
        spoil=json_fields("model/tokenizer_config.json", chat_template=None),
    ),
    Case("template absent", ("chat template", "own.jinja"), OWN),
    Case("template with a syntax error", ("own.jinja", "line 2"), OWN, template("a\n{% if %}")),
    Case(
        "template that raises",
        ("chats.jsonl:1", "own.jinja", "no system"),
        OWN,
        template("{{ raise_exception('no system') }}"),
    ),
    Case(
        "template that loops for ever",
        ("own.jinja", "4 s"),
        OWN,
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    ),
    Case(
        "template that writes for ever",
        ("own.jinja", "MiB of memory"),
        OWN,
        template("{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}"),
    ),
    Case(
        "template that reads what it must not",
        ("own.jinja", "__class__"),
        OWN,
        template("{{ messages.__class__.__mro__ }}"),
    ),
    Case(
        "template without the answers",
        ("own.jinja", "answer", "turn 2"),
        OWN,
        template("{{ messages[0].content }}<|im_end|>"),
    ),
    Case(
        "template without an end of turn",
        ("own.jinja", "special token", "answer"),
        OWN,
        template("{% for m in messages %}{{ m.content }}{% endfor %}"),
    ),
    Case(
        "plain template without an eos_token",
        ("plain", "eos_token"),
        ("--data.template", "plain"),
        json_fields("model/tokenizer_config.json", eos_token=None),
    ),
    # conversations
    Case(
        "no answer tokens within max_length",
        ("max_length 8", "answer"),
        ("--data.max_length", "8"),
    ),
    Case(
        "unknown role",
        ("chats.jsonl:3", "turn 1", "role", "usr", "'user'"),
        spoil=all_said(("usr", "what"), ("assistant", "it")),
    ),
    Case(
        "empty content",
        ("chats.jsonl:3", "turn 2", "empty"),
        spoil=all_said(("user", "what"), ("assistant", " ")),
    ),
    Case(
        "assistant first",
        ("chats.jsonl:3", "assistant", "first"),
        spoil=all_said(("assistant", "it"), ("user", "what"), ("assistant", "it")),
    ),
    Case(
        "half a weight",
        ("chats.jsonl:3", "turn 2", "weight", 0.5),
        spoil=third_answer(weight=0.5),
    ),
    Case(
        "a template without tools",
        ("chats.jsonl:3", "tools", "data.template"),
        spoil=third_answer(tools=[{"name": "x"}]),
    ),
    Case("no assistant", ("chats.jsonl:3", "assistant"), spoil=all_said(("user", "what"))),
    Case(
        "an answer missing",
        ("chats.jsonl:5", "'output'"),
        spoil=line(5, '{"instruction": "a"}', "chats.jsonl"),
    ),
    Case(
        "an answer empty",
        ("chats.jsonl:5", "'output'", "empty"),
        spoil=line(5, '{"instruction": "a", "output": ""}', "chats.jsonl"),
    ),
    Case(
        "wrong columns",
        ("chats.jsonl", "asked, label", "instruction and output"),
        spoil=lambda world: world.write_rows("chats.jsonl", [{"asked": "a", "label": "b"}] * 60),
    ),
    Case(
        "column_names that are none of ours",
        ("columns", "question"),
        ("--data.column_names", '{{"question": "instruction"}}'),
    ),
    Case(
        "column_names that the file lacks",
        ("chats.jsonl:1", "'instructions'", "'instruction'"),
        ("--data.column_names", '{{"instruction": "instructions", "output": "output"}}'),
    ),
    Case("column_names a word", ("data.column_names", "mapping"), ("--data.column_names", "output")),
    Case("max_length above the model's", ("data.max_length", 65, "64 tokens"), ("--data.max_length", "65")),
    Case(
        "batch larger than the packed rows",
        ("train.batch_size", 84, "rows"),
        ("--data.packing", "true", "--data.max_length", "64", "--train.batch_size", "84"),
    ),
    # questions
    Case(
        "answer that is no choice",
        ("questions.jsonl:7", "'answer'", "'it is pink'"),
        QUESTIONS,
        question(answer="it is pink"),
    ),
    Case(
        "a single choice",
        ("questions.jsonl:7", "two choices"),
        QUESTIONS,
        question(choices=["it"]),
    ),
    Case(
        "question too long",
        ("24 tokens", "max_length 23"),
        (*QUESTIONS, "--data.max_length", "23"),
    ),
    Case(
        "conversations for multiple choice",
        ("chats.jsonl", "Answer format"),
        ("--task", "multiple_choice"),
    ),
    # settings
    Case("pooling", ("model.pooling", "classification", "instruction"), ("--model.pooling", "cls")),
    Case("label", ("data.label", "instruction"), ("--data.label", "output")),
    Case(
        "remat for an encoder",
        ("model.remat", "instruction", "multiple_choice", "classification"),
        ("--task", "classification", *NO_PROMPT, "--model.remat", "full"),
    ),
    Case("remat unknown", ("model.remat", "'ful'", "full"), ("--model.remat", "ful")),
    Case("attention unknown", ("model.attention", "'flash'", "blocked"), ("--model.attention", "flash")),
    Case(
        "attention for a TPU",
        ("model.attention", "splash", "tpu", "cpu", "blocked"),
        ("--model.attention", "splash"),
    ),
    Case("loss_chunk 0", ("model.loss_chunk", 0), ("--model.loss_chunk", "0")),
    Case("answers unknown", ("data.answers", "'first'", "last"), ("--data.answers", "first")),
    Case("answers for questions", ("data.answers", "instruction"), (*QUESTIONS, "--data.answers", "last")),
    Case("prompt empty", ("train.prompt", "empty"), ("--train.prompt", " ")),
    Case("prompt too long", ("prompt 1 of 1", "74 tokens", 56), ("--train.prompt", "what " * 60)),
    Case(
        "answer longer than the model",
        ("answers", "64 tokens", 64),
        ("--train.prompt_tokens", "64"),
    ),
    Case(
        "prompt_tokens without a prompt",
        ("train.prompt_tokens", "train.prompt"),
        spoil=config("train", prompt=None),
    ),
    Case("target matches nothing", ("'query'", "q_proj"), ("--lora.target_modules", "[query]")),
    Case(
        "a head of its own that a tied model lacks",
        ("lora.modules_to_save", "'lm_head'", "tied", "embed_tokens"),
        ("--lora.modules_to_save", "[lm_head]"),
        lambda world: tiny.write_model(world.model, tie_word_embeddings=True),
    ),
    # using it
    Case(
        "predict with a language model",
        ("out", "language model", "generate"),
        ("predict", "{out}", "--text", "a"),
        run=True,
    ),
    Case("eval of no split", ("'tests'", "'test'"), (*EVAL, "--split", "tests"), run=True),
    Case(
        "eval of a file of another kind",
        ("conversations", "prompt, choices, answer"),
        (*EVAL, "--data", "{dir}/questions.jsonl"),
        run=True,
    ),
    Case("top_p 0", ("top_p", 0), (*ASK, "--top_p", "0")),
    Case("top_p 2", ("top_p", 1, 2.0), (*ASK, "--top_p", "2")),
    Case("temperature -1", ("temperature", -1.0), (*ASK, "--temperature", "-1")),
    Case("max_tokens 0", ("max_tokens", 0), (*ASK, "--max_tokens", "0")),
    Case("max_tokens above the model's", ("answers", "64 tokens", 64), (*ASK, "--max_tokens", "64")),
    Case("batch_size 0", ("batch_size", 0), (*ASK, "--batch_size", "0")),
    Case("seed negative", ("seed", -1), (*ASK, "--temperature", "1", "--seed", "-1")),
    Case("a seed without a temperature", ("--seed", "--temperature"), (*ASK, "--seed", "1")),
    Case("generate from nothing", ("--prompt", "--data"), ("generate", "{dir}/model")),
    Case("generate from both", ("--prompt or --data",), (*ASK, "--data", "{dir}/chats.jsonl")),
    Case("generate for an empty prompt", ("prompt", "empty"), ("generate", "{dir}/model", "--prompt", " ")),
    Case(
        "generate for a prompt too long",
        ("prompt 1 of 1", "74 tokens", 54),
        ("generate", "{dir}/model", "--prompt", "what " * 60, "--max_tokens", "10"),
    ),
    Case(
        "system beside data",
        ("--system", "--prompt"),
        ("generate", "{dir}/model", "--data", "{dir}/chats.jsonl", "--system", "a"),
    ),
    Case(
        "generate with a model that is none",
        ("model", "nowhere"),
        ("generate", "nowhere", "--prompt", "a"),
    ),
    Case(
        "generate with an encoder",
        ("model_type", "'bert'"),
        ASK,
        json_fields("model/config.json", model_type="bert"),
    ),
    Case(
        "a template for a run",
        ("--template", "--dtype", "run"),
        (*SPEAK, "--template", "plain"),
        run=True,
    ),
    Case(
        "generate into a file that exists",
        ("old.jsonl",),
        (*ASK, "--output", "{dir}/old.jsonl"),
        write("old.jsonl", "mine"),
    ),
    Case("generate with an unknown option", ("generate", "--topp 1"), (*ASK, "--topp", "1")),
    Case(
        "generate with a base that changed",
        ("base.weights", "--allow_different base.weights"),
        SPEAK,
        tensors(lambda t: t[QUERY].__setitem__((0, 0), 1.0)),
        True,
    ),
]


# A finished run takes longer to make than all else here.
SLOW = ("template that loops for ever",)
PARAMS = [
    pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.run or c.name in SLOW else []) for c in CASES
]


@pytest.mark.parametrize("case", PARAMS)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    case, first_talk, request, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    home = request.getfixturevalue("finished_talk") if case.run else first_talk
    assert_rejected(case, home.copy(tmp_path), capsys)
