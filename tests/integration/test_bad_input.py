"""Whatever is wrong with the input: one clear line, exit code 2, no traceback, and nothing written."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from loraplus_jax.cli.commands import COMMANDS, main

from ..messages import assert_mentions
from .runs import flags

pytestmark = pytest.mark.usefixtures("cache")

QUERY = "encoder.layer.0.attention.self.query.weight"


class Case(NamedTuple):
    """A bad input.

    Attributes:
      name: of the case.
      words: all must stand in the first line of what is printed, in any order.
      args: added to `loraplus train CONFIG`, or the whole command line if they begin with a command.
      spoil: makes the tiny world bad beforehand.
      run: whether the world holds a finished run.
    """

    name: str
    words: tuple[str, ...]
    args: str = ""
    spoil: Callable | None = None
    run: bool = False


def tensors(change):
    return lambda world: world.change_tensors(change)


def write(name, content):
    """Replaces a file of the world."""

    def spoil(world):
        path = world.directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def cut(name, size):
    """Leaves only the first bytes of a file."""

    def spoil(world):
        path = world.directory / name
        path.write_bytes(path.read_bytes()[:size])

    return spoil


def remove(name):
    return lambda world: (world.directory / name).unlink()


def json_fields(name, **fields):
    """Replaces fields of a JSON file; None takes one out."""

    def spoil(world):
        path = world.directory / name
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


def both(*spoils):
    def spoil(world):
        for one in spoils:
            one(world)

    return spoil


def config(section=None, **values):
    return lambda world: world.change_config(section, **values)


def line(number, text, name="texts.csv"):
    """Replaces a line of a file, counted from 1."""

    def spoil(world):
        path = world.directory / name
        lines = path.read_text().split("\n")
        lines[number - 1] = text
        path.write_text("\n".join(lines))

    return spoil


def links_to_nothing(world):
    for name in ("link", "link.jsonl"):
        (world.directory / name).symlink_to(world.directory / "nothing")


def _bert_processing(end):
    return {"type": "BertProcessing", "sep": ["[SEP]", end], "cls": ["[CLS]", 2]}


EVAL, PREDICT = "eval {out}", "predict {out}"
GLUE = "--data.root {dir} --data.path"
RATING = "--task regression --data.label rating"
STRANGER = "~nosuchuser/x"
CASES = [
    # weights
    Case("tensor missing", ("1 missing", f"- {QUERY} [16, 16]"), spoil=tensors(lambda t: t.pop(QUERY))),
    Case(
        "tensor of whole numbers",
        (QUERY, "I64"),
        spoil=tensors(lambda t: t.update({QUERY: np.ones((16, 16), np.int64)})),
    ),
    Case(
        "a layer fewer than config.json says",
        ("num_hidden_layers", 3, 2),
        spoil=json_fields("model/config.json", num_hidden_layers=3),
    ),
    # the model's other files
    Case("tokenizer.json missing", ("model", "tokenizer.json"), spoil=remove("model/tokenizer.json")),
    Case("tokenizer.json garbled", ("model/tokenizer.json",), spoil=cut("model/tokenizer.json", 50)),
    Case("model path unknown", ("model", "'minilmm'", "'minilm'"), "--model.path minilmm"),
    Case(
        "special token beyond the embedding",
        ("model", "'[SEP]'", 9999, "embedding", "vocab_size"),
        spoil=json_fields("model/tokenizer.json", post_processor=_bert_processing(9999)),
    ),
    Case(
        "token type of a pair beyond its embedding",
        ("model", "pairs", 1, "type_vocab_size"),
        "--data.text_pair rating",
        spoil=json_fields("model/config.json", type_vocab_size=1),
    ),
    Case("model path is a file", ("texts.csv",), "--model.path {dir}/texts.csv"),
    Case("model path names data", ("'movie-reviews'", "data", "model"), "--model.path movie-reviews"),
    # GLUE
    Case("root without a GLUE task", ("data.root", "data.path", "texts.csv"), "--data.root {dir}"),
    Case("column of a GLUE task", ("data.text", "glue/rte"), GLUE + " glue/rte --data.text x"),
    Case("quotes not closed", ("data.quoting", "none", "texts.csv:2"), spoil=line(2, '"a" b,yes,1')),
    Case(
        "submission of a run without a task", ("--glue", "glue/sst2"), PREDICT + " --glue {dir}/x", run=True
    ),
    Case("submission and texts", ("--glue", "--text"), PREDICT + " --glue {dir}/x --text a", run=True),
    # what is adapted
    Case("lr_ratio nan", ("lora.lr_ratio", "nan"), "--lora.lr_ratio nan"),
    Case("target matches nothing", ("'querry'", "query"), "--lora.target_modules [querry]"),
    Case(
        "target has no matrix",
        ("target_modules", "'attention_norm'"),
        "--lora.target_modules [attention_norm]",
    ),
    # the theory's terms
    Case("theory_every 0", ("train.theory_every", 0), "--train.theory_every 0"),
    Case("theory of full", ("train.theory_every", "method full"), "--train.theory_every 3 --method full"),
    Case("theory_every a word", ("train.theory_every", "null", "'often'"), "--train.theory_every often"),
    Case(
        "theory of embeddings",
        ("nothing to measure", "embeddings"),
        "--train.theory_every 3 --lora.target_modules [word]",
    ),
    # the config file
    Case("config file absent", ("nowhere.yaml",), "inspect nowhere.yaml"),
    Case("config file missing from the command", ("train", "CONFIG"), "train"),
    Case("config file garbled", ("config.yaml", "YAML"), spoil=write("config.yaml", "model: [\n")),
    Case("config file empty", ("config.yaml", "mapping"), spoil=write("config.yaml", "")),
    Case(
        "config file not UTF-8", ("config.yaml", "YAML"), spoil=write("config.yaml", b"model: {path: \xff}\n")
    ),
    Case("unknown key", ("lora", "'lr_ration'", "'lr_ratio'"), spoil=config("lora", lr_ration=1)),
    Case("unknown option", ("--lora.rnk", "lora.rank"), "--lora.rnk 3"),
    Case("max_length above the model's", ("data.max_length", 25, "24 tokens"), "--data.max_length 25"),
    Case("max_length without room", ("max_length", 2), "--data.max_length 2"),
    Case(
        "mesh does not divide the batch",
        ("batch_size / accumulate", 12, "mesh.data 8"),
        "--mesh.data 8 --train.batch_size 12",
    ),
    Case(
        "mesh does not divide the evaluation",
        ("eval_batch_size", 12, "mesh.data 8"),
        "--mesh.data 8 --train.eval_batch_size 12",
    ),
    Case("mesh too large", ("mesh.data", -1, 1, 8, 9), "--mesh.data 9"),
    Case(
        "mesh that does not divide the devices",
        ("fsdp 3", "8 devices", "mesh.fsdp", "1, 2, 4, 8"),
        "--mesh.data -1 --mesh.fsdp 3",
    ),
    Case(
        "heads that tensor does not divide",
        ("mesh.tensor", 4, "num_attention_heads", 2, "1, 2"),
        "--mesh.tensor 4 --mesh.data 2",
    ),
    Case(
        "full in bf16",
        ("method full", "model.param_dtype", "float32"),
        "--method full --model.param_dtype bfloat16",
    ),
    Case(
        "steps that no counter holds",
        ("train.steps", 2147483647, 900000000000000),
        "--train.steps 900000000000000",
    ),
    Case(
        "epochs that no counter holds",
        ("train.epochs", "1e+18", 2147483647),
        "--train.steps null --train.epochs 1e18",
    ),
    Case("lr_ratio beyond float32", ("lora.lr_ratio", "1e+300", "float32"), "--lora.lr_ratio 1e300"),
    Case(
        "B's rate beyond float32",
        ("lora.lr_ratio", "optimizer.learning_rate", "float32"),
        "--lora.lr_ratio 1e30 --optimizer.learning_rate 1e30",
    ),
    Case(
        "learning rate that counts as zero",
        ("optimizer.learning_rate", "1e-60", "float32"),
        "--optimizer.learning_rate 1e-60",
    ),
    Case("b2 that counts as one", ("optimizer.b2", 1, 0.9999999999), "--optimizer.b2 0.9999999999"),
    *(
        Case(
            f"inspect with a mesh of {size}",
            ("mesh.data", 8, size),
            f"inspect {{dir}}/config.yaml --mesh.data {size}",
        )
        for size in ("0", "-2", "9")
    ),
    Case(
        "inspect with a mesh that does not divide the batch",
        ("batch_size / accumulate", 36, "mesh.data 8"),
        "inspect {dir}/config.yaml --mesh.data 8 --train.batch_size 36",
    ),
    Case(
        "inspect with a mesh that does not divide the devices",
        ("3 devices", 8, "mesh.data", "1, 2, 4, 8"),
        "inspect {dir}/config.yaml --mesh.data 3",
    ),
    # data
    Case("data file absent", ("data", "nowhere.csv"), "--data.path nowhere.csv"),
    Case("data is a directory", ("data", "one file", "model"), "--data.path {dir}/model"),
    Case("CSV with a field too many", ("texts.csv:7", 4, 3), spoil=line(7, "a,b,c,d")),
    Case(
        "text beyond all bounds",
        ("texts.csv:2", "4,194,304"),
        spoil=write("texts.csv", "text,label\n" + "x" * (2**22 + 1) + ",yes\na,no\n"),
    ),
    Case(
        "one label only",
        ("classification", "'yes'", "train"),
        spoil=write("texts.csv", "text,label\n" + "".join(f"{i},yes\n" for i in range(40))),
    ),
    Case(
        "ratings all the same",
        ("labels", "train", 1),
        RATING,
        spoil=write("texts.csv", "text,rating\n" + "".join(f"{i},1\n" for i in range(40))),
    ),
    # the output directory
    Case("output_dir is a file", ("out", "a file"), spoil=write("out", "mine")),
    Case("output_dir below a file", ("out/deep",), "--output_dir {out}/deep", spoil=write("out", "mine")),
    Case(
        "output_dir holds foreign files",
        ("out", "files"),
        spoil=both(lambda w: w.out.mkdir(), write("out/thesis.txt", "mine")),
    ),
    Case("output_dir holds a finished run", ("out", "finished", "--fresh"), run=True),
    Case("bad input with --fresh leaves the old run", ("lora.rank", 0), "--fresh --lora.rank 0", run=True),
    Case("output_dir with a null character", ("output_dir", "null"), "--output_dir a\0b"),
    Case("export below a file", ("--to", "texts.csv"), "export {out} --to {dir}/texts.csv/x", run=True),
    # a link to nothing is not written to
    *(
        Case(f"{command} to a link", ("link",), command, links_to_nothing, True)
        for command in (
            *("export {out} --to {dir}/link", "export {out} --merged --to {dir}/link"),
            *(PREDICT + " --text a --output {dir}/link.jsonl", "plan {dir}/config.yaml --json {dir}/link"),
            *("--output_dir {dir}/link", "--output_dir {dir}/link/below"),
            "sweep {dir}/config.yaml --output_dir {dir}/link",
        )
    ),
    # a home directory of nobody
    Case("predict there", ("--output", STRANGER), f"{PREDICT} --text a --output {STRANGER}.jsonl", run=True),
    *(
        Case(f"{command} {STRANGER}", (field, STRANGER, "~nosuchuser"), f"{command} {STRANGER}", run=True)
        for field, command in [
            *((name, f"train {{dir}}/config.yaml --{name}") for name in ("output_dir", "init_adapter")),
            *((name, f"train {{dir}}/config.yaml --{name}.path") for name in ("model", "data")),
            ("output_dir", "sweep {dir}/config.yaml --output_dir"),
            *(("model", f"{command} {{dir}}/config.yaml --model.path") for command in ("plan", "inspect")),
            ("--json", "plan {dir}/config.yaml --json"),
            *(("config", command) for command in ("train", "sweep", "plan", "inspect")),
            ("RUN", "eval"),
            ("data", EVAL + " --data"),
            ("RUN", "predict --text a"),
            ("model", "generate --prompt hi"),
            ("RUN", "export --to to"),
            ("--to", "export {out} --to"),
        ]
    ),
    # eval, predict, fetch
    Case("fetch unknown", ("'minilmm'", "'minilm'"), "fetch minilmm"),
    Case(
        "eval of no run",
        ("model", "adapter.json", "adapter_config.json", "loraplus.json"),
        "eval {dir}/model",
    ),
    Case("eval of nothing", ("nowhere", "does not exist"), "eval nowhere"),
    Case(
        "inspect with an adapter that is not there",
        ("init_adapter", "nowhere", "does not exist"),
        "inspect {dir}/config.yaml --init_adapter nowhere",
    ),
    Case("eval with an unknown option", ("eval", "--lora.rank"), EVAL + " --lora.rank 3", run=True),
    Case("eval of no split", ("'tests'", "'test'"), EVAL + " --split tests", run=True),
    Case(
        "eval with labels unknown",
        ("other.csv:2", "'maybe'"),
        EVAL + " --data {dir}/other.csv",
        spoil=write("other.csv", "text,label\na,maybe\n"),
        run=True,
    ),
    Case("eval without the data", ("data", "texts.csv"), EVAL, spoil=remove("texts.csv"), run=True),
    Case(
        "base changed",
        ("base.weights", "--allow_different"),
        EVAL,
        spoil=tensors(lambda t: t[QUERY].__setitem__((0, 0), 1.0)),
        run=True,
    ),
    Case(
        "adapter without settings",
        ("adapter", "loraplus train"),
        EVAL,
        spoil=json_fields("out/adapter/adapter.json", settings=None, digest=None),
        run=True,
    ),
    Case(
        "adapter incomplete",
        ("adapter", "adapter.json"),
        EVAL,
        spoil=remove("out/adapter/adapter.json"),
        run=True,
    ),
    Case("predict without text", ("--text, --data or --glue",), PREDICT, run=True),
    Case(
        "predict with text and data",
        ("--text, --data or --glue",),
        PREDICT + " --text a --data {dir}/texts.csv",
        run=True,
    ),
    Case("predict for an empty text", ("text", "empty"), PREDICT + " --text ' '", run=True),
    Case(
        "generate with an encoder",
        ("encoder", "classification", "predict"),
        "generate {out} --prompt a",
        run=True,
    ),
    Case(
        "predict for a file without texts",
        ("texts.tsv:1", "'text'"),
        PREDICT + " --data {dir}/texts.tsv",
        spoil=write("texts.tsv", "a\tb\n1\t2\n"),
        run=True,
    ),
    Case(
        "predict into a file that exists",
        ("old.jsonl",),
        PREDICT + " --text a --output {dir}/old.jsonl",
        spoil=write("old.jsonl", "mine"),
        run=True,
    ),
    Case(
        "predict into another kind of file",
        (".jsonl", "new.csv"),
        PREDICT + " --text a --output {dir}/new.csv",
        run=True,
    ),
    Case(
        "predict into no directory",
        ("nowhere/new.jsonl",),
        PREDICT + " --text a --output {dir}/nowhere/new.jsonl",
        run=True,
    ),
]


def command(case, world):
    """The command line of a case."""
    args = flags(case.args.format(dir=world.directory, out=world.out))
    if args[:1] and args[0] in COMMANDS:
        return args
    return ("train", str(world.config), *args)


def contents(directory):
    """Every file below, with what is in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    case, first_world, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert_rejected(case, (finished if case.run else first_world).copy(tmp_path), capsys)


def assert_rejected(case, world, capsys):
    """`loraplus` says in one line what is wrong with a case, and leaves its world as it is."""
    if case.spoil is not None:
        case.spoil(world)
    before = contents(world.directory)
    capsys.readouterr()
    assert main([*command(case, world)]) == 2
    printed = capsys.readouterr()
    first = printed.err.splitlines()[0]
    assert first.startswith("loraplus: error: ")
    assert_mentions(first, *case.words)
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
