"""Whatever is wrong with the input: one clear line, exit code 2, no traceback, and nothing written."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from loraplus_jax.cli.commands import COMMANDS, main

from ..messages import assert_mentions
from . import language_world as tiny
from .runs import flags

pytestmark = pytest.mark.usefixtures("cache")

QUERY = "encoder.layer.0.attention.self.query.weight"

# What makes a fresh world bad: functions of it.


def tensors(change):
    return lambda world: world.change_tensors(change)


def write(name, content):
    """Replaces a file of the world."""
    content = content if isinstance(content, bytes) else content.encode()
    return lambda world: (world.directory / name).write_bytes(content)


def cut(name, size):
    """Leaves only the first bytes of a file."""
    return lambda world: write(name, (world.directory / name).read_bytes()[:size])(world)


def remove(name):
    return lambda world: (world.directory / name).unlink()


def json_fields(name, **fields):
    """Replaces fields of a JSON file; None takes one out."""

    def spoil(world):
        path = world.directory / name
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


def line(number, text, name="texts.csv"):
    """Replaces a line of a file, counted from 1."""

    def spoil(world):
        path = world.directory / name
        lines = path.read_text().split("\n")
        lines[number - 1] = text
        path.write_text("\n".join(lines))

    return spoil


def word_beyond_the_embedding(world):
    path = world.model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["good"] = 500
    path.write_text(json.dumps(content))


def links_to_nothing(world):
    for name in ("link", "link.jsonl"):
        (world.directory / name).symlink_to(world.directory / "nothing")


def foreign_files(world):
    world.out.mkdir()
    write("out/thesis.txt", "mine")(world)


def gguf(*, size=None, **options):
    """The language model as a GGUF file, or as the first bytes of one."""

    def spoil(world):
        tiny.write_gguf_of(world.model, world.directory / "tiny.gguf", **options)
        if size:
            cut("tiny.gguf", size)(world)

    return spoil


def tools_in_the_third(world):
    rows = [
        {"messages": [{"role": "user", "content": f"what {n}"}, {"role": "assistant", "content": "it"}]}
        for n in range(60)
    ]
    rows[2]["tools"] = [{"name": "x"}]
    world.write_rows("chats.jsonl", rows)


SEPARATOR = {"type": "BertProcessing", "sep": ["[SEP]", 9999], "cls": ["[CLS]", 2]}
Q5_0 = {"blk.0.ffn_up.weight": ("Q5_0", np.zeros((tiny.INNER, 22), np.uint8))}
SPOIL = {
    "no tensor": tensors(lambda t: t.pop(QUERY)),
    "integers": tensors(lambda t: t.update({QUERY: np.ones((16, 16), np.int64)})),
    "no tokenizer": remove("model/tokenizer.json"),
    "half a tokenizer": cut("model/tokenizer.json", 50),
    "[SEP] 9999": json_fields("model/tokenizer.json", post_processor=SEPARATOR),
    "word 500": word_beyond_the_embedding,
    "one type": json_fields("model/config.json", type_vocab_size=1),
    "bert": json_fields("model/config.json", model_type="bert"),
    "half a config": write("config.yaml", "model: [\n"),
    "no config": write("config.yaml", ""),
    "bytes": write("config.yaml", b"model: {path: \xff}\n"),
    "quote": line(2, '"a" b,yes,1'),
    "four fields": line(7, "a,b,c,d"),
    "long text": write("texts.csv", "text,label\n" + "x" * (2**22 + 1) + ",yes\na,no\n"),
    "one label": write("texts.csv", "text,label\n" + "".join(f"{i},yes\n" for i in range(40))),
    "one rating": write("texts.csv", "text,rating\n" + "".join(f"{i},1\n" for i in range(40))),
    "out file": write("out", "mine"),
    "foreign": foreign_files,
    "links": links_to_nothing,
    "maybe": write("other.csv", "text,label\na,maybe\n"),
    "no data": remove("texts.csv"),
    "no notes": remove("out/adapter/adapter.json"),
    "no settings": json_fields("out/adapter/adapter.json", settings=None, digest=None),
    "no texts": write("texts.tsv", "a\tb\n1\t2\n"),
    "old": write("old.jsonl", "mine"),
    "Q5_0": gguf(raw=Q5_0),
    "half a GGUF": gguf(size=20_000),
    "GGUF without": gguf(**{"tokenizer.chat_template": None}),
    "no template": json_fields("model/tokenizer_config.json", chat_template=None),
    "endless": write("own.jinja", "{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}"),
    "tools": tools_in_the_third,
    "columns": lambda world: world.write_rows("chats.jsonl", [{"asked": "a", "label": "b"}] * 60),
    "tied": lambda world: tiny.write_model(world.model, tie_word_embeddings=True),
}

# A case a line: words that stand in the message | what is added to `loraplus train CONFIG`, or a command line
# of its own | what makes the world bad.
SHORTHANDS = {
    "CONFIG": "{dir}/config.yaml",
    "ASK": "generate {dir}/model --prompt what",
    "LONG": "'" + "what " * 60 + "'",
    "SWEEP": "sweep {dir}/config.yaml --output_dir {out}",
    "NEITHER": "--train.prompt null --train.prompt_tokens 64",
}
CASES = {
    "first_world": """
config.yaml YAML | | half a config
config.yaml mapping | | no config
config.yaml YAML | | bytes
train CONFIG | train |
--lora.rnk lora.rank | --lora.rnk 3 |
querry query | --lora.target_modules [querry] |
target_modules attention_norm | --lora.target_modules [attention_norm] |
train.theory_every 0 | --train.theory_every 0 |
train.theory_every "method full" | --train.theory_every 3 --method full |
train.theory_every null often | --train.theory_every often |
data.max_length 25 "24 tokens" | --data.max_length 25 |
max_length 2 | --data.max_length 2 |
"batch_size / accumulate" 12 "mesh.data 8" | --mesh.data 8 --train.batch_size 12 |
"method full" model.param_dtype float32 | --method full --model.param_dtype bfloat16 |
train.steps 2147483647 900000000000000 | --train.steps 900000000000000 |
train.epochs 1e+18 2147483647 | --train.steps null --train.epochs 1e18 |
lora.lr_ratio optimizer.learning_rate float32 | --lora.lr_ratio 1e30 --optimizer.learning_rate 1e30 |
optimizer.learning_rate 1e-60 float32 | --optimizer.learning_rate 1e-60 |
optimizer.b2 1 0.9999999999 | --optimizer.b2 0.9999999999 |
"1 missing" "[16, 16]" encoder.layer.0.attention.self.query.weight | | no tensor
model tokenizer.json | | no tokenizer
model/tokenizer.json | | half a tokenizer
model [SEP] 9999 embedding vocab_size | | [SEP] 9999
good 500 | | word 500
model pairs 1 type_vocab_size | --data.text_pair rating | one type
texts.csv | --model.path {dir}/texts.csv |
data.root data.path texts.csv | --data.root {dir} |
data nowhere.csv | --data.path nowhere.csv |
data "one file" model | --data.path {dir}/model |
data.quoting none texts.csv:2 | | quote
texts.csv:7 4 3 | | four fields
texts.csv:2 4,194,304 | | long text
classification yes train | | one label
labels train 1 | --task regression --data.label rating | one rating
out "a file" | | out file
out/deep | --output_dir {out}/deep | out file
out files | | foreign
output_dir null | --output_dir a\0b |
link/below | --output_dir {dir}/link/below | links
output_dir ~nosuchuser/x | train CONFIG --output_dir ~nosuchuser/x |
nowhere.yaml | inspect nowhere.yaml |
data ~nosuchuser/x | --data.path ~nosuchuser/x |
link | plan CONFIG --json {dir}/link | links
model adapter.json adapter_config.json loraplus.json | eval {dir}/model |
nowhere "does not exist" | eval nowhere |
RUN ~nosuchuser/x | predict --text a ~nosuchuser/x |
""",
    "first_world, slow": """
"nothing to measure" embeddings | --train.theory_every 3 --lora.target_modules [word] |
encoder.layer.0.attention.self.query.weight I64 | | integers
"test split" | SWEEP --data.test_fraction 0 |
init_adapter nowhere "does not exist" | inspect CONFIG --init_adapter nowhere |
""",
    "finished": """
out finished --fresh | |
lora.rank 0 | --fresh --lora.rank 0 |
eval --lora.rank | eval {out} --lora.rank 3 |
tests test | eval {out} --split tests |
other.csv:2 maybe | eval {out} --data {dir}/other.csv | maybe
data texts.csv | eval {out} | no data
adapter "loraplus train" | eval {out} | no settings
adapter adapter.json | eval {out} | no notes
texts.tsv:1 text | predict {out} --data {dir}/texts.tsv | no texts
old.jsonl | predict {out} --text a --output {dir}/old.jsonl | old
.jsonl new.csv | predict {out} --text a --output {dir}/new.csv |
nowhere/new.jsonl | predict {out} --text a --output {dir}/nowhere/new.jsonl |
link | predict {out} --text a --output {dir}/link.jsonl | links
encoder classification predict | generate {out} --prompt a |
--to texts.csv | export {out} --to {dir}/texts.csv/x |
link | export {out} --to {dir}/link | links
""",
    "first_talk": """
tiny.gguf GGUF | --model.path {dir}/tiny.gguf | half a GGUF
tiny.gguf "chat template" data.template | --model.path {dir}/tiny.gguf | GGUF without
model_type bert "llama, mistral" | | bert
model_type llama bert | --task classification NEITHER |
model "chat template" plain | | no template
own.jinja "MiB of memory" | --data.template {dir}/own.jinja | endless
"max_length 8" answer | --data.max_length 8 |
data.max_length 65 "64 tokens" | --data.max_length 65 |
chats.jsonl:3 tools data.template | | tools
chats.jsonl "asked, label" "instruction and output" | | columns
train.batch_size 84 rows | --data.packing true --data.max_length 64 --train.batch_size 84 |
chats.jsonl "Answer format" | --task multiple_choice |
model.attention splash tpu cpu blocked | --model.attention splash |
lora.modules_to_save lm_head tied embed_tokens | --lora.modules_to_save [lm_head] | tied
model.quantize GGUF nf4 | --model.quantize file |
model.quantize method full | --model.quantize nf4 --method full |
model.quantize_exclude model.quantize | --model.quantize_exclude [o_proj] |
model.quantize_exclude o_prj o_proj | --model.quantize nf4 --model.quantize_exclude [o_prj] |
sweep.control false pissa | SWEEP --lora.init pissa |
lora.init lora_ga seed | SWEEP --lora.init lora_ga |
sweep.ranks null pissa | SWEEP --lora.init pissa --sweep.ranks [2,4] |
optimizer.target_rank train.select last | --optimizer.target_rank 2 |
optimizer.target_rank adamw | --train.select last --optimizer.name riemannian --optimizer.target_rank 2 |
optimizer.target_rank 4 5 | --train.select last --optimizer.target_rank 5 |
max_tokens 0 | ASK --max_tokens 0 |
answers "64 tokens" 64 | ASK --max_tokens 64 |
batch_size 0 | ASK --batch_size 0 |
seed -1 | ASK --temperature 1 --seed -1 |
prompt empty | generate {dir}/model --prompt ' ' |
"prompt 1 of 1" "74 tokens" 54 | generate {dir}/model --prompt LONG --max_tokens 10 |
model nowhere | generate nowhere --prompt a |
model_type bert | ASK | bert
generate "--topp 1" | ASK --topp 1 |
""",
    "first_talk, slow": """
tiny.gguf Q5_0 Q4_K | --model.path {dir}/tiny.gguf | Q5_0
"prompt 1 of 1" "74 tokens" 56 | --train.prompt LONG |
answers "64 tokens" 64 | --train.prompt_tokens 64 |
""",
    "finished_talk": """
out "language model" generate | predict {out} --text a |
conversations "prompt, choices, answer" | eval {out} --data {dir}/questions.jsonl |
--template --dtype run | generate {out} --prompt what --template plain |
""",
}


def cases():
    """Every third is quick, but none of a finished run: it takes longer to train than all else here."""
    number = itertools.count()
    for fixture, table in CASES.items():
        is_slow = fixture.endswith("slow") or fixture.startswith("finished")
        for row in table.strip().splitlines():
            words, arguments, spoiler = (part.strip() for part in row.split("|"))
            case = (fixture.partition(",")[0], words, arguments, spoiler)
            marks = [pytest.mark.slow] if is_slow or next(number) % 3 else []
            yield pytest.param(*case, marks=marks, id=f"{arguments or spoiler}: {words}")


def contents(directory):
    """Every file below, with what is in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize(("world", "words", "arguments", "spoiler"), [*cases()])
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    request, tmp_path, monkeypatch, capsys, world, words, arguments, spoiler
):
    monkeypatch.chdir(tmp_path)
    world = request.getfixturevalue(world).copy(tmp_path)
    for name, text in SHORTHANDS.items():
        arguments = arguments.replace(name, text)
    command = flags(arguments.format(dir=world.directory, out=world.out))
    if not command or command[0] not in COMMANDS:
        command = ("train", str(world.config), *command)
    if spoiler:
        SPOIL[spoiler](world)
    before = contents(world.directory)
    capsys.readouterr()
    assert main([*command]) == 2
    printed = capsys.readouterr()
    first = printed.err.splitlines()[0]
    assert first.startswith("loraplus: error: ")
    assert_mentions(first, *flags(words))
    assert "Traceback" not in printed.err
    assert printed.err.count("error:") == 1
    assert contents(world.directory) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["'trian'", "train"]),
        ([], ["COMMAND"]),
        (["eval"], ["RUN"]),
        (["predict", "somewhere", "--text"], ["--text"]),
        (["eval", "somewhere", "--shots", "x\ny"], ["--shots", "int", "loraplus eval --help"]),
        (["train", "c.yaml", "--allow_different"], ["--allow_different", "loraplus train --help"]),
    ],
)
def test_a_command_line_that_argparse_rejects(args, words, capsys):
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("loraplus: error: ")
    for word in words:
        assert word in line


@pytest.mark.slow
def test_a_process_ends_with_code_2_and_one_line(first_world, tmp_path):
    world = first_world.copy(tmp_path)
    cut("model/model.safetensors", 900)(world)
    before = contents(tmp_path)
    command = [sys.executable, "-m", "loraplus_jax.cli", "train", str(world.config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"loraplus: error: {world.model}/model.safetensors (900 bytes)")
    assert done.stdout == ""
    assert contents(tmp_path) == before


def test_a_traceback_is_shown_on_demand(monkeypatch):
    monkeypatch.setenv("LORAPLUS_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"nowhere.yaml"):
        main(["train", "nowhere.yaml"])
