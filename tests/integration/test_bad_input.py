"""Whatever is wrong with the input: one clear line, exit code 2, no traceback, and nothing written."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from loraplus_jax.cli.commands import main

from ..messages import assert_mentions

pytestmark = pytest.mark.usefixtures("cache")

QUERY = "encoder.layer.0.attention.self.query.weight"


class Case(NamedTuple):
    """A bad input.

    Attributes:
      name: of the case.
      words: all must stand in the first line of what is printed, in any order.
      args: added to `loraplus train CONFIG`, or the whole command line if they begin with another command.
      spoil: makes the tiny world bad beforehand.
      run: whether the world holds a finished run.
    """

    name: str
    words: tuple[str, ...]
    args: tuple[str, ...] = ()
    spoil: Callable | None = None
    run: bool = False


def tensors(change):
    return lambda world: world.change_tensors(change)


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


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


def jsonl(number, text):
    """The data as JSON lines, one of them replaced."""

    def spoil(world):
        world.write_rows("texts.jsonl", world.rows())
        line(number, text, "texts.jsonl")(world)

    return spoil


def validation_label(label):
    """Separate files, and a label in the second that the first does not have."""

    def spoil(world):
        rows = world.rows()
        world.write_rows("first.csv", rows[:100])
        world.write_rows("second.csv", [*rows[100:], {**rows[0], "label": label}])

    return spoil


def pickle_only(world):
    (world.model / "model.safetensors").rename(world.model / "pytorch_model.bin")


def ghost_shard(world):
    (world.model / "model.safetensors").unlink()
    index = {"weight_map": {QUERY: "model-00001-of-00002.safetensors"}}
    (world.model / "model.safetensors.index.json").write_text(json.dumps(index))


def _bert_processing(end):
    return {"type": "BertProcessing", "sep": ["[SEP]", end], "cls": ["[CLS]", 2]}


EVAL, PREDICT = ("eval", "{out}"), ("predict", "{out}")
GLUE = ("--data.root", "{dir}", "--data.path")
SEPARATE = ("--data.path", "null", "--data.train", "{dir}/first.csv", "--data.validation", "{dir}/second.csv")
RATING = ("--task", "regression", "--data.label", "rating")
CASES = [
    # weights
    Case("tensor missing", ("1 missing", f"- {QUERY} [16, 16]"), spoil=tensors(lambda t: t.pop(QUERY))),
    Case(
        "tensor extra",
        ("1 extra", "+ adapter.x [3]"),
        spoil=tensors(lambda t: t.update({"adapter.x": np.ones(3)})),
    ),
    Case("tensor renamed", ("1 missing, 1 extra",), spoil=tensors(lambda t: rename(t, QUERY, QUERY + "s"))),
    Case(
        "tensor misshapen",
        ("misshapen", f"~ {QUERY} is [16, 8]", "[16, 16]"),
        spoil=tensors(lambda t: t.update({QUERY: np.ones((16, 8), np.float32)})),
    ),
    Case(
        "tensor of whole numbers",
        (QUERY, "I64"),
        spoil=tensors(lambda t: t.update({QUERY: np.ones((16, 16), np.int64)})),
    ),
    Case(
        "weights truncated",
        ("model/model.safetensors", "safetensors"),
        spoil=cut("model/model.safetensors", 900),
    ),
    Case("weights empty", ("model/model.safetensors", "0 bytes"), spoil=cut("model/model.safetensors", 0)),
    Case("weights only as a pickle", ("pytorch_model.bin", "pickle"), spoil=pickle_only),
    Case(
        "weights absent",
        (
            "model",
            "weights",
        ),
        spoil=remove("model/model.safetensors"),
    ),
    Case(
        "shard absent",
        (
            "model-00001-of-00002.safetensors",
            "missing",
        ),
        spoil=ghost_shard,
    ),
    Case(
        "a layer fewer than config.json says",
        ("num_hidden_layers", 3, 2),
        spoil=json_fields("model/config.json", num_hidden_layers=3),
    ),
    # the model's other files
    Case(
        "config.json garbled",
        (
            "model/config.json",
            "JSON",
        ),
        spoil=cut("model/config.json", 30),
    ),
    Case(
        "config.json missing",
        (
            "model/config.json",
            "missing",
        ),
        spoil=remove("model/config.json"),
    ),
    Case(
        "config.json without a size",
        (
            "hidden_size",
            "missing",
        ),
        spoil=json_fields("model/config.json", hidden_size=None),
    ),
    Case(
        "config.json with heads that do not divide",
        ("num_attention_heads", 3, 16),
        spoil=json_fields("model/config.json", num_attention_heads=3),
    ),
    Case(
        "config.json with an unknown activation",
        ("hidden_act", "swoosh"),
        spoil=json_fields("model/config.json", hidden_act="swoosh"),
    ),
    Case(
        "another model_type",
        ("model_type", "'gpt2'", "bert"),
        spoil=json_fields("model/config.json", model_type="gpt2"),
    ),
    Case(
        "tokenizer.json missing",
        (
            "model",
            "tokenizer.json",
        ),
        spoil=remove("model/tokenizer.json"),
    ),
    Case(
        "tokenizer.json garbled",
        ("model/tokenizer.json",),
        spoil=cut("model/tokenizer.json", 50),
    ),
    Case(
        "model path unknown",
        ("model", "'minilmm'", "'minilm'"),
        ("--model.path", "minilmm"),
    ),
    Case(
        "special token beyond the embedding",
        ("model", "'[SEP]'", 9999, "embedding", "vocab_size"),
        spoil=json_fields("model/tokenizer.json", post_processor=_bert_processing(9999)),
    ),
    Case(
        "token type of a pair beyond its embedding",
        ("model", "pairs", 1, "type_vocab_size"),
        ("--data.text_pair", "rating"),
        spoil=json_fields("model/config.json", type_vocab_size=1),
    ),
    Case("model path is a file", ("texts.csv",), ("--model.path", "{dir}/texts.csv")),
    Case(
        "model path names data",
        (
            "'movie-reviews'",
            "data",
            "model",
        ),
        ("--model.path", "movie-reviews"),
    ),
    # GLUE
    Case("GLUE task unknown", ("glue/mrcp", "'mrpc'"), (*GLUE, "glue/mrcp")),
    Case(
        "GLUE task of another kind",
        ("glue/stsb", "task", "regression", "classification"),
        (*GLUE, "glue/stsb"),
    ),
    Case("GLUE directory of no task", ("data.root", "RTE", "glue/rte", "model"), (*GLUE, "glue/rte")),
    Case(
        "GLUE directory absent",
        ("data.root", "nowhere", "RTE"),
        ("--data.path", "glue/rte", "--data.root", "nowhere"),
    ),
    Case("root without a GLUE task", ("data.root", "data.path", "texts.csv"), ("--data.root", "{dir}")),
    Case("column of a GLUE task", ("data.text", "glue/rte"), (*GLUE, "glue/rte", "--data.text", "x")),
    Case("quotes not closed", ("data.quoting", "none", "texts.csv:2"), spoil=line(2, '"a" b,yes,1')),
    Case(
        "submission of a run without a task",
        ("--glue", "glue/sst2"),
        (*PREDICT, "--glue", "{dir}/x"),
        run=True,
    ),
    Case(
        "submission and texts", ("--glue", "--text"), (*PREDICT, "--glue", "{dir}/x", "--text", "a"), run=True
    ),
    # what is adapted
    Case("lr_ratio 0", ("lora.lr_ratio", 0), ("--lora.lr_ratio", "0")),
    Case("lr_ratio negative", ("lora.lr_ratio", -1), ("--lora.lr_ratio", "-1")),
    Case("lr_ratio nan", ("lora.lr_ratio", "nan"), ("--lora.lr_ratio", "nan")),
    Case("lr_ratio inf", ("lora.lr_ratio", "inf"), spoil=config("lora", lr_ratio=float("inf"))),
    Case("rank 0", ("lora.rank", 0), ("--lora.rank", "0")),
    Case("rank above min(in, out)", ("rank", "17", "16"), ("--lora.rank", "17")),
    Case("rank a word", ("lora.rank", "four"), ("--lora.rank", "four")),
    Case("alpha 0", ("lora.alpha", 0), ("--lora.alpha", "0")),
    Case("dropout 1", ("lora.dropout", 1), ("--lora.dropout", "1")),
    Case("target matches nothing", ("'querry'", "query"), ("--lora.target_modules", "[querry]")),
    Case(
        "target has no matrix",
        ("target_modules", "'attention_norm'"),
        ("--lora.target_modules", "[attention_norm]"),
    ),
    Case("exclusion of nothing", ("exclude_modules", "'down'"), ("--lora.exclude_modules", "[down]")),
    Case("parameter that does not exist", ("target_parameters", "'w'"), ("--lora.target_parameters", "[w]")),
    Case(
        "axis letters that do not fit",
        ("'eio'", "(26, 16)"),
        ("--lora.target_parameters", '{{".*word/embedding": "eio"}}'),
    ),
    Case(
        "layer that does not exist",
        ("layers_to_transform", "7", "[0, 1]"),
        ("--lora.layers_to_transform", "[7]"),
    ),
    Case("pattern for nothing", ("rank_pattern", "'key'"), ("--lora.rank_pattern", '{{"key": 2}}')),
    Case(
        "pattern with a word for a rank",
        ("lora.rank_pattern", "integer"),
        ("--lora.rank_pattern", '{{"query": x}}'),
    ),
    Case(
        "adapted and trained in full", ("modules_to_save", "'query'"), ("--lora.modules_to_save", "[query]")
    ),
    Case("decay without its schedule", ("optimizer.decay_steps", "wsd"), ("--optimizer.decay_steps", "3")),
    Case("policy unknown", ("optimizer.policy", "peft"), ("--optimizer.policy", "torch")),
    Case(
        "target is a broken expression",
        ("target_modules", "'(query'"),
        ("--lora.target_modules", "(query"),
    ),
    Case("target empty", ("target_modules",), ("--lora.target_modules", "[]")),
    Case(
        "modules_to_save matches nothing",
        ("modules_to_save", "'pooller'"),
        ("--lora.modules_to_save", "[pooller]"),
    ),
    Case("init unknown", ("lora.init", "loraa", "lora_b"), ("--lora.init", "loraa")),
    # the config file
    Case("config file absent", ("nowhere.yaml",), ("inspect", "nowhere.yaml")),
    Case("config file missing from the command", ("train", "CONFIG"), ("train",)),
    Case("config file garbled", ("config.yaml", "YAML"), spoil=write("config.yaml", "model: [\n")),
    Case("config file empty", ("config.yaml", "mapping"), spoil=write("config.yaml", "")),
    Case(
        "config file not UTF-8",
        ("config.yaml", "YAML"),
        spoil=write("config.yaml", b"model: {path: \xff}\n"),
    ),
    *(
        Case(
            f"unknown key in {section}",
            (section, repr(key), repr(near)),
            spoil=config(section, **{key: 1}),
        )
        for section, key, near in [
            ("model", "pathh", "path"),
            ("data", "max_len", "max_length"),
            ("lora", "lr_ration", "lr_ratio"),
            ("optimizer", "warmup_step", "warmup_steps"),
            ("train", "batchsize", "batch_size"),
            ("mesh", "date", "data"),
        ]
    ),
    Case("unknown key at the top", ("'sed'", "'seed'"), spoil=config(sed=1)),
    Case("section is a number", ("train", "mapping", 3), spoil=config(train=3)),
    Case("required key absent", ("model.path",), spoil=config("model", path=None)),
    Case("unknown option", ("--lora.rnk", "lora.rank"), ("--lora.rnk", "3")),
    Case("option without value", ("--lora.rank",), ("--lora.rank",)),
    Case("stray word", ("stray",), ("stray",)),
    Case("learning rate a word", ("optimizer.learning_rate", "fast"), ("--optimizer.learning_rate", "fast")),
    Case("method unknown", ("method", "lora_pluss", "lora_plus"), ("--method", "lora_pluss")),
    Case("batch size a fraction", ("train.batch_size", "1.5"), ("--train.batch_size", "1.5")),
    Case("steps 0", ("train.steps", 0), ("--train.steps", "0")),
    Case("steps and epochs", ("train.steps", "train.epochs", 40, 2.0), ("--train.epochs", "2")),
    Case(
        "accumulate does not divide",
        ("train.accumulate", "train.batch_size", 3, 32),
        ("--train.accumulate", "3"),
    ),
    Case(
        "final_fraction under a constant schedule",
        ("optimizer.final_fraction",),
        ("--optimizer.schedule", "constant", "--optimizer.final_fraction", "0.1"),
    ),
    Case(
        "warm-up as long as the run",
        ("optimizer.warmup_steps", 40),
        ("--optimizer.warmup_steps", "40"),
    ),
    Case(
        "batch larger than the data",
        ("train.batch_size", 128, "112 rows"),
        ("--train.batch_size", "128"),
    ),
    Case("max_length above the model's", ("data.max_length", 25, "24 tokens"), ("--data.max_length", "25")),
    Case("max_length without room", ("max_length", 2), ("--data.max_length", "2")),
    Case(
        "mesh does not divide the batch",
        ("batch_size / accumulate", 12, "mesh.data 8"),
        ("--mesh.data", "8", "--train.batch_size", "12"),
    ),
    Case(
        "mesh does not divide the evaluation",
        ("eval_batch_size", 12, "mesh.data 8"),
        ("--mesh.data", "8", "--train.eval_batch_size", "12"),
    ),
    Case("mesh too large", ("mesh.data", -1, 1, 8, 9), ("--mesh.data", "9")),
    Case(
        "mesh that does not divide the devices",
        ("fsdp 3", "8 devices", "mesh.fsdp", "1, 2, 4, 8"),
        ("--mesh.data", "-1", "--mesh.fsdp", "3"),
    ),
    Case(
        "heads that tensor does not divide",
        ("mesh.tensor", 4, "num_attention_heads", 2, "1, 2"),
        ("--mesh.tensor", "4", "--mesh.data", "2"),
    ),
    Case(
        "processes without a coordinator",
        ("distributed.processes", "distributed.coordinator", "HOST:PORT"),
        ("--distributed.processes", "2"),
    ),
    Case(
        "full in bf16",
        ("method full", "model.param_dtype", "float32"),
        ("--method", "full", "--model.param_dtype", "bfloat16"),
    ),
    Case(
        "steps that no counter holds",
        ("train.steps", 2147483647, 900000000000000),
        ("--train.steps", "900000000000000"),
    ),
    Case(
        "epochs that no counter holds",
        ("train.epochs", "1e+18", 2147483647),
        ("--train.steps", "null", "--train.epochs", "1e18"),
    ),
    Case(
        "lr_ratio beyond float32",
        ("lora.lr_ratio", "1e+300", "float32"),
        ("--lora.lr_ratio", "1e300"),
    ),
    Case("alpha beyond float32", ("lora.alpha", "1e+300", "float32"), ("--lora.alpha", "1e300")),
    Case(
        "B's rate beyond float32",
        ("lora.lr_ratio", "optimizer.learning_rate", "float32"),
        ("--lora.lr_ratio", "1e30", "--optimizer.learning_rate", "1e30"),
    ),
    Case(
        "learning rate that counts as zero",
        ("optimizer.learning_rate", "1e-60", "float32"),
        ("--optimizer.learning_rate", "1e-60"),
    ),
    Case("eps that counts as zero", ("optimizer.eps", "1e-60"), ("--optimizer.eps", "1e-60")),
    Case("b2 that counts as one", ("optimizer.b2", 1, 0.9999999999), ("--optimizer.b2", "0.9999999999")),
    *(
        Case(
            f"inspect with a mesh of {size}",
            ("mesh.data", 8, size),
            ("inspect", "{dir}/config.yaml", "--mesh.data", size),
        )
        for size in ("0", "-2", "9")
    ),
    Case(
        "inspect with a mesh that does not divide the batch",
        ("batch_size / accumulate", 36, "mesh.data 8"),
        ("inspect", "{dir}/config.yaml", "--mesh.data", "8", "--train.batch_size", "36"),
    ),
    Case(
        "inspect with a mesh that does not divide the devices",
        ("3 devices", 8, "mesh.data", "1, 2, 4, 8"),
        ("inspect", "{dir}/config.yaml", "--mesh.data", "3"),
    ),
    Case("seed negative", ("seed", -1), ("--seed", "-1")),
    # data
    Case("data file absent", ("data", "nowhere.csv"), ("--data.path", "nowhere.csv")),
    Case("data is a directory", ("data", "one file", "model"), ("--data.path", "{dir}/model")),
    Case(
        "data of another kind",
        ("config.yaml", ".yaml", ".csv, .tsv, .jsonl"),
        ("--data.path", "{dir}/config.yaml"),
    ),
    Case("data file empty", ("texts.csv:1", "empty"), spoil=write("texts.csv", "")),
    Case("data file with a header only", ("texts.csv:1", "rows"), spoil=write("texts.csv", "text,label\n")),
    Case(
        "column missing",
        ("texts.csv:1", "'lable'", "'label'"),
        ("--data.label", "lable"),
    ),
    Case(
        "CSV with a field too many",
        ("texts.csv:7", 4, 3),
        spoil=line(7, "a,b,c,d"),
    ),
    Case("CSV with an open quote", ("texts.csv:150",), spoil=line(150, '"open,yes,1')),
    Case("CSV with an empty text", ("texts.csv:9", "'text'", "empty"), spoil=line(9, " ,yes,1")),
    Case(
        "CSV not UTF-8",
        ("texts.csv:2", "0xff", "UTF-8"),
        spoil=write("texts.csv", b"text,label\ngo\xffd,yes\n"),
    ),
    Case(
        "JSON lines broken",
        ("texts.jsonl:3", "JSON"),
        ("--data.path", "{dir}/texts.jsonl"),
        jsonl(3, '{"text": "a"'),
    ),
    Case(
        "JSON line without the label",
        ("texts.jsonl:4", "'label'"),
        ("--data.path", "{dir}/texts.jsonl"),
        jsonl(4, '{"text": "a"}'),
    ),
    Case(
        "JSON line with a key twice",
        ("texts.jsonl:5", "JSON", '"text"'),
        ("--data.path", "{dir}/texts.jsonl"),
        jsonl(5, '{"text": "a", "label": "yes", "text": "b"}'),
    ),
    Case(
        "one number as two labels",
        ("'1'", "'1.0'"),
        spoil=write(
            "texts.csv", "text,label\n" + "".join(f"{i},{('1', '1.0', '2')[i % 3]}\n" for i in range(60))
        ),
    ),
    Case(
        "text beyond all bounds",
        ("texts.csv:2", "4,194,304"),
        spoil=write("texts.csv", "text,label\n" + "x" * (2**22 + 1) + ",yes\na,no\n"),
    ),
    Case(
        "label that training lacks",
        ("second.csv:62", "'yess'", "'yes'"),
        SEPARATE,
        validation_label("yess"),
    ),
    Case(
        "one label only",
        ("classification", "'yes'", "train"),
        spoil=write("texts.csv", "text,label\n" + "".join(f"{i},yes\n" for i in range(40))),
    ),
    Case(
        "rating that is no number",
        ("texts.csv:5", "regression", "'three'"),
        RATING,
        line(5, "a good film,yes,three"),
    ),
    Case(
        "rating infinite",
        ("texts.csv:5", "regression", "'inf'"),
        RATING,
        line(5, "a good film,yes,inf"),
    ),
    Case(
        "ratings all the same",
        ("labels", "train", 1),
        RATING,
        write("texts.csv", "text,rating\n" + "".join(f"{i},1\n" for i in range(40))),
    ),
    Case(
        "too few texts to split",
        ("texts.csv", "2 distinct texts"),
        spoil=write("texts.csv", "text,label\na,yes\nb,no\n"),
    ),
    # the output directory
    Case("output_dir is a file", ("out", "a file"), spoil=write("out", "mine")),
    Case("output_dir below a file", ("out/deep",), ("--output_dir", "{out}/deep"), write("out", "mine")),
    Case(
        "output_dir holds foreign files",
        ("out", "files"),
        spoil=both(lambda w: w.out.mkdir(), write("out/thesis.txt", "mine")),
    ),
    Case(
        "output_dir holds foreign files, --fresh",
        ("out", "files"),
        ("--fresh",),
        both(lambda w: w.out.mkdir(), write("out/thesis.txt", "mine")),
    ),
    Case(
        "output_dir below a directory that takes no files",
        ("output_dir", "/proc/loraplus/deep"),
        ("--output_dir", "/proc/loraplus/deep"),
    ),
    Case("output_dir blank", ("output_dir", "empty"), ("--output_dir", " ")),
    Case("output_dir holds a finished run", ("out", "finished", "--fresh"), run=True),
    Case(
        "output_dir holds a run of other settings",
        ("lora.rank", 4, 2, "--fresh"),
        ("--lora.rank", "2"),
        run=True,
    ),
    Case(
        "bad input with --fresh leaves the old run",
        ("lora.rank", 0),
        ("--fresh", "--lora.rank", "0"),
        run=True,
    ),
    # eval, predict, fetch
    Case(
        "fetch unknown",
        ("'minilmm'", "'minilm'"),
        ("fetch", "minilmm"),
    ),
    Case(
        "eval of no run",
        ("model", "adapter.json", "adapter_config.json", "loraplus.json"),
        ("eval", "{dir}/model"),
    ),
    Case("eval of nothing", ("nowhere", "does not exist"), ("eval", "nowhere")),
    Case(
        "inspect with an adapter that is not there",
        ("init_adapter", "nowhere", "does not exist"),
        ("inspect", "{dir}/config.yaml", "--init_adapter", "nowhere"),
    ),
    Case(
        "eval with an unknown option",
        ("eval", "--lora.rank 3"),
        (*EVAL, "--lora.rank", "3"),
        run=True,
    ),
    Case(
        "eval of no split",
        ("'tests'", "'test'"),
        (*EVAL, "--split", "tests"),
        run=True,
    ),
    Case(
        "eval with labels unknown",
        ("other.csv:2", "'maybe'"),
        (*EVAL, "--data", "{dir}/other.csv"),
        write("other.csv", "text,label\na,maybe\n"),
        True,
    ),
    Case("eval without the data", ("data", "texts.csv"), EVAL, remove("texts.csv"), True),
    Case(
        "base changed",
        ("base.weights", "--allow_different"),
        EVAL,
        tensors(lambda t: t[QUERY].__setitem__((0, 0), 1.0)),
        True,
    ),
    Case(
        "adapter truncated",
        ("adapter/adapter.safetensors",),
        EVAL,
        cut("out/adapter/adapter.safetensors", 500),
        True,
    ),
    Case(
        "adapter.json truncated",
        ("adapter/adapter.json", "JSON"),
        EVAL,
        cut("out/adapter/adapter.json", 500),
        True,
    ),
    Case(
        "adapter of another format",
        ("adapter.json", "format", 99),
        EVAL,
        json_fields("out/adapter/adapter.json", format=99),
        True,
    ),
    Case(
        "adapter without settings",
        ("adapter", "loraplus train"),
        EVAL,
        json_fields("out/adapter/adapter.json", settings=None, digest=None),
        True,
    ),
    Case(
        "adapter incomplete",
        ("adapter", "adapter.json"),
        EVAL,
        remove("out/adapter/adapter.json"),
        True,
    ),
    Case("predict without text", ("--text, --data or --glue",), PREDICT, run=True),
    Case(
        "predict with text and data",
        ("--text, --data or --glue",),
        (*PREDICT, "--text", "a", "--data", "{dir}/texts.csv"),
        run=True,
    ),
    Case("predict for an empty text", ("text", "empty"), (*PREDICT, "--text", " "), run=True),
    Case(
        "generate with an encoder",
        ("encoder", "classification", "predict"),
        ("generate", "{out}", "--prompt", "a"),
        run=True,
    ),
    Case(
        "predict for a file without texts",
        ("texts.tsv:1", "'text'"),
        (*PREDICT, "--data", "{dir}/texts.tsv"),
        write("texts.tsv", "a\tb\n1\t2\n"),
        True,
    ),
    Case(
        "predict into a file that exists",
        ("old.jsonl",),
        (*PREDICT, "--text", "a", "--output", "{dir}/old.jsonl"),
        write("old.jsonl", "mine"),
        True,
    ),
    Case(
        "predict into another kind of file",
        (".jsonl", "new.csv"),
        (*PREDICT, "--text", "a", "--output", "{dir}/new.csv"),
        run=True,
    ),
    Case(
        "predict into no directory",
        ("nowhere/new.jsonl",),
        (*PREDICT, "--text", "a", "--output", "{dir}/nowhere/new.jsonl"),
        run=True,
    ),
]


def command(case, world):
    """The command line of a case."""
    places = {"dir": world.directory, "out": world.out}
    args = [arg.format(**places) if "{" in arg else arg for arg in case.args]
    if args[:1] and args[0] in ("train", "inspect", "eval", "predict", "generate", "fetch"):
        return args
    return ["train", str(world.config), *args]


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
    assert main(command(case, world)) == 2
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
