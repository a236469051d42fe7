"""Nothing that a user sets is unused: every field is changed, and something that can be seen changes with it.

`tests/settings/test_schema.py` proves that every field is read; here each that no other file proves has a proof, a
function from settings to something comparable, and a base on which it has an effect.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import describe, make_mesh, save_adapter
from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.data.fetch import resolve
from loraplus_jax.models.files import open_files
from loraplus_jax.settings.parsing import parse_settings, setting_fields
from loraplus_jax.settings.schema import Settings
from loraplus_jax.tasks import chat_generation
from loraplus_jax.tasks.held_out_generation import HeldOutTexts
from loraplus_jax.training import setup
from loraplus_jax.training import trainer as training
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.programs import trace_step
from loraplus_jax.training.trainer import Trainer, train

from ..training.preparation import without_compiling
from . import language_world as language
from .runs import flags

pytestmark = pytest.mark.slow

QUIET = LineConsole(quiet=True)
ONES = jnp.ones((1, 3))


class Found(Exception):
    """Carries what a proof wants out of the middle of a run, and ends it there."""


def ending(*values):
    """Ends a run where this is called."""

    def end(*_, **__):
        raise Found(*values)

    return end


def hashed(tree):
    """Path to shape, dtype and hash of the bytes; a ragged column is an array of arrays."""

    def content(leaf):
        rows = leaf if leaf.dtype == object else [leaf]
        return [(row.shape, str(row.dtype), np.asarray(row).tobytes()) for row in rows]

    return {
        path: (leaf.shape, hashlib.sha256(repr(content(leaf)).encode()).hexdigest())
        for path, leaf in leaves_by_path(tree).items()
    }


# Proofs: settings to something comparable.


def loaded(settings):
    """The model's files, and the data."""
    files = open_files(resolve(settings.model.path, "model"))
    return files, setup.task_class(settings).load(settings.task_options, files)


def arrays(settings):
    """The task, and every split as arrays."""
    data = loaded(settings)[1]
    return data.task, {name: hashed(columns) for name, columns in data.splits.items()}


def described(settings):
    """A run before any weights are read."""
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    files, data = loaded(settings)
    return setup.abstract_run(settings, files, data, mesh)


def shapes(settings):
    """The specs of the adapters, and the shapes of what is trained and what is frozen."""
    parts = described(settings).parts
    return parts.specs, str(parts.trainable), str(parts.frozen)


def shardings(settings):
    return str(described(settings).run.shardings)


def program(settings):
    """The training step that is given to the compiler."""
    return str(trace_step(described(settings).run).jaxpr)


def variables(settings):
    """What is trained and what is frozen, before the first step."""
    with without_compiling():
        parts = setup.prepare(settings).parts
    return hashed(parts.trainable), hashed(parts.frozen)


def length(settings):
    """Optimizer steps in all."""
    return setup.count_steps(settings, examples=112)


def updates(settings):
    """What the optimizer makes of given gradients at the first steps, and its rates at the last."""
    tx = setup.make_optimizer(settings.optimizer, settings.lr_ratio, length(settings), None)
    params = {
        "lora": {"query": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3)), "lora_magnitude": ONES}},
        "table": {"lora_embedding_a": jnp.ones((3, 2)), "lora_embedding_b": jnp.ones((2, 3))},
        "params": {"head": {"bias": jnp.ones(2)}},
    }
    state, found = tx.init(params), []
    for size in (1e-3, 2.0, 0.5):
        update, state = tx.update(jax.tree.map(lambda x: jnp.full_like(x, size), params), state, params)  # noqa: B023
        found.append(hashed(update))
    return found, {row.role: row.rate for row in describe(params, tx, step=length(settings) - 1).rows}


PREPARED = {}
"""The run of the file's world. Its programs are not compiled."""


def trainer(settings):
    """A trainer with these settings; none of them changes how a run is prepared."""
    output = SimpleNamespace(path=Path("unused"), manager=None, console=QUIET)
    run = PREPARED["run"]._replace(settings=settings)
    own = jax.tree.map(jnp.array, run.parts.trainable)  # a trainer takes their memory
    return Trainer(run._replace(parts=run.parts._replace(trainable=own)), output)


def first_batch(settings):
    return hashed(described(settings).batches.batch(settings.seed, 0))


def random_key(settings):
    """From which every step takes its dropout."""
    return jax.random.key_data(trainer(settings).state.rng).tolist()


def evaluation_batches(settings):
    """The shape of the batches in which a split is evaluated."""
    batches = described(settings).batches
    return batches.evaluate["weight"].shape


def cache_in_use(settings):
    """Where compiled programs are kept when a run has come to its preparation."""

    def prepare(*_, **__):
        raise Found(jax.config.values["jax_compilation_cache_dir"])

    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare", prepare)
        with pytest.raises(Found) as found:
            train(settings, console=QUIET)
    jax.config.update("jax_compilation_cache_dir", before)
    return found.value.args[0]


def searched(settings):
    """How the run searches for texts, and for how many inputs, a batch and in all."""
    files, data = loaded(settings)
    model = setup.base_parts(settings, files, data.task).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_generation, "make_beam_search", lambda *_, **options: lambda *_: [options])
        texts = HeldOutTexts.from_options(settings.task_options, files, data.task, model, data.inputs)
    return texts.model.generate(*[None] * 5), texts.batch_size, len(texts.inputs)


# The table.


class Change(NamedTuple):
    """A field, another value for it, the proof that it matters, and what else must be set for that."""

    name: str
    value: str
    proof: Callable[[Settings], Any]
    base: tuple[str, ...] = ()


ELSEWHERE = {
    **{f"distributed.{name}": "test_processes.py" for name in ("processes", "process_id", "coordinator")},
    **{f"distributed.{name}_timeout": "test_processes.py" for name in ("start", "lost")},
    "optimizer.target_rank": "kinds.py",
    "train.theory_every": "kinds.py",
    **{f"train.{name}": "test_run.py" for name in ("early_stopping", "eval_every", "keep")},
    **{f"train.{name}": "kinds.py" for name in ("log_every", "prompt")},
    "train.prompt_tokens": "test_bad_input.py",
    "train.report_to": "test_disturbances.py",
    "init_adapter_rates": "test_export.py",
    **{
        f"optimizer.{name}": "../training/test_optimizer.py"
        for name in (
            *(
                "name",
                "policy",
                "learning_rate",
                "head_learning_rate",
                "b1",
                "b2",
                "eps",
                "weight_decay",
                "decay",
            ),
            *("max_grad_norm", "schedule", "warmup_steps", "decay_steps", "final_fraction"),
        )
    },
    "train.select": "test_disturbances.py",
    "train.max_skipped": "test_disturbances.py",
    "output_dir": "conftest.py",
}
"""Fields whose effect other tests show, and in which file."""

WIDE = ("--data.path", "{dir}/wide.csv")
BARE = ("--data.path", "{dir}/bare.csv", "--data.header", "[text, second, label]")
BOTH = ("--data.path", "{dir}/both.csv")
FILES = ("--data.path", "null", "--data.train", "{dir}/first.csv")
TALK = flags(
    "--task instruction --model.path {dir}/talk --data.path {dir}/chats.jsonl --data.max_length 128"
    " --model.dropout null --model.head_dropout 0.1 --lora.target_modules [q_proj,v_proj]"
)
PHI = (*TALK, *flags("--model.path {dir}/phi --lora.target_modules [o_proj]"))
DESCRIBE = (*TALK, *flags("--task generation --data.path {dir}/descriptions.csv"))
RENAMED = '{{"instruction": "asked", "output": "said"}}'
CHANGES = [
    Change("model.path", "{dir}/other", variables),
    Change("model.pooling", "cls", program),
    Change("model.dtype", "bfloat16", program),
    Change("model.param_dtype", "bfloat16", shapes),
    Change("model.quantize", "int8", shapes),
    Change("model.quantize_exclude", "[query]", shapes, ("--model.quantize", "int8")),
    Change("model.dropout", "0.2", program),
    Change("model.head_dropout", "0.3", program),
    Change("model.unroll", "false", program),
    Change("model.split_fused", "true", shapes, PHI),
    Change("model.remat", "full", program, TALK),
    Change("model.attention", "xla", program, TALK),
    Change("model.loss_chunk", "64", program, TALK),
    Change("data.path", "{dir}/first.csv", arrays),
    Change("data.train", "{dir}/more.csv", arrays, FILES),
    Change("data.validation", "{dir}/last.csv", arrays, FILES),
    Change("data.test", "{dir}/last.csv", arrays, FILES),
    Change("data.text", "text2", arrays, WIDE),
    Change("data.text_pair", "second", arrays, WIDE),
    Change("data.label", "label2", arrays, WIDE),
    Change("data.metrics", "[f1]", arrays),
    Change("data.delimiter", ";", arrays, BOTH),
    Change("data.quoting", "none", arrays, ("--data.path", "{dir}/quoted.csv")),
    Change("data.header", "[second, text, label]", arrays, BARE),
    Change("data.limit", "20", arrays),
    Change("data.root", "{dir}", arrays, ("--data.path", "glue/sst2", "--data.root", "{dir}/glue")),
    Change("data.max_length", "4", arrays),
    Change("data.validation_fraction", "0.2", arrays),
    Change("data.test_fraction", "0.1", arrays),
    Change("data.split_seed", "3", arrays),
    Change("data.duplicates", "drop", arrays, (*FILES, "--data.test", "{dir}/more.csv")),
    Change("data.template", "{dir}/template.jinja", arrays, TALK),
    Change("data.answers", "last", arrays, TALK),
    Change("data.packing", "true", arrays, TALK),
    Change("data.column_names", RENAMED, arrays, TALK),
    Change("lora.target_modules", "[query]", shapes),
    Change("lora.rank", "3", shapes),
    Change("lora.alpha", "7.0", shapes),
    Change("lora.dropout", "0.1", program),
    Change("lora.lr_ratio", "2.0", updates),
    Change("lora.init", "lora_b", variables),
    Change("lora.init_iterations", "1", variables, ("--lora.init", "pissa")),
    Change("lora.modules_to_save", "[attention_norm]", shapes),
    Change("lora.exclude_modules", "[up]", shapes, ("--lora.target_modules", "all-linear")),
    Change("lora.target_parameters", '{{".*word/embedding": "io"}}', shapes),
    Change("lora.layers_to_transform", "[1]", shapes),
    Change("lora.rank_pattern", '{{"query": 2}}', shapes),
    Change("lora.alpha_pattern", '{{"query": 2.0}}', shapes),
    Change("lora.use_rslora", "true", shapes),
    Change("lora.variant", "dora", shapes),
    Change("lora.bias", "all", shapes),
    Change("optimizer.embedding_learning_rate", "1e-3", updates),
    Change("optimizer.magnitude_learning_rate", "1e-3", updates, ("--lora.variant", "dora")),
    Change("optimizer.reg", "0.5", updates, ("--optimizer.name", "riemannian")),
    Change("train.steps", "7", length),
    Change("train.epochs", "1.5", length, ("--train.steps", "null")),
    Change("train.batch_size", "16", first_batch),
    Change("train.accumulate", "2", program),
    Change("train.eval_batch_size", "8", evaluation_batches),
    Change("train.compilation_cache", "false", cache_in_use),
    Change("train.label_smoothing", "0.1", program, TALK),
    Change("generation.beams", "2", searched, DESCRIBE),
    Change("generation.length_penalty", "0.5", searched, DESCRIBE),
    Change("generation.no_repeat_ngram", "3", searched, DESCRIBE),
    Change("generation.no_repeat_in", "all", searched, (*DESCRIBE, "--generation.no_repeat_ngram", "3")),
    Change("generation.early_stopping", "never", searched, DESCRIBE),
    Change("generation.max_new_tokens", "9", searched, DESCRIBE),
    Change("generation.inputs", "2", searched, DESCRIBE),
    Change("generation.batch_size", "3", searched, DESCRIBE),
    Change("mesh.data", "2", shardings),
    Change("mesh.fsdp", "2", shardings),
    Change("mesh.tensor", "2", shardings),
    Change("task", "regression", arrays, ("--data.label", "rating")),
    Change("method", "full", shapes),
    Change("init_adapter", "{dir}/adapter", variables),
    Change("seed", "9", variables),
    Change("seed", "9", first_batch),
    Change("seed", "9", random_key),
]


def two_turns(row):
    """A conversation with two answers, and another one in columns of other names."""
    said = [("user", row["instruction"]), ("assistant", row["output"]), ("user", "what"), ("assistant", "it")]
    messages = [{"role": role, "content": text} for role, text in said]
    return {"messages": messages, "asked": f"tell {row['instruction']}", "said": row["output"]}


@pytest.fixture(scope="module")
def home(first_world, tmp_path_factory, cache):
    """The world of this file: another model and other data beside the usual ones."""
    world = first_world.copy(tmp_path_factory.mktemp("effects"))
    other = first_world.copy(tmp_path_factory.mktemp("other"))
    other.change_tensors(lambda tensors: tensors["embeddings.LayerNorm.weight"].__setitem__(0, 3.0))
    other.model.rename(world.directory / "other")
    rows = world.rows()
    more = [{"second": "a film", "text2": f"so {row['text']}", "label2": row["label"][::-1]} for row in rows]
    world.write_rows("wide.csv", [row | extra for row, extra in zip(rows, more, strict=True)])
    lines = [f"a {row['text']},so {row['text']},{row['label']}" for row in rows]
    (world.directory / "bare.csv").write_text("\n".join(lines) + "\n")
    texts = [row["text"].replace(",", "").replace(";", "") for row in rows]
    # A table with commas and, of other values, with semicolons.
    lines = [f"{t},{row['label']},so;{t} so;{row['label']}" for t, row in zip(texts, rows, strict=True)]
    (world.directory / "both.csv").write_text("\n".join(["text,label,x;text;label", *lines]) + "\n")
    lines = [f'"{text}",{row["label"]}' for text, row in zip(texts, rows, strict=True)]
    (world.directory / "quoted.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    for root, part in {"glue": rows[:100], ".": rows[60:]}.items():
        (world.directory / root / "SST-2").mkdir(parents=True)
        signs = [{"sentence": row["text"], "label": i % 2} for i, row in enumerate(part)]
        world.write_rows(f"{root}/SST-2/train.tsv", signs)
        world.write_rows(f"{root}/SST-2/dev.tsv", signs[:20])
    for name, part in {"first": rows[:100], "last": rows[100:], "more": rows[60:]}.items():
        world.write_rows(f"{name}.csv", part)
    (world.directory / "talk").mkdir()
    language.write_model(world.directory / "talk", max_position_embeddings=128)
    (world.directory / "phi").mkdir()
    language.write_model(world.directory / "phi", max_position_embeddings=128)
    language.write_family(world.directory / "phi", "phi3")
    world.write_rows("chats.jsonl", list(map(two_turns, language.chats())))
    world.write_rows("descriptions.csv", language.descriptions())
    with without_compiling():
        PREPARED["run"] = run = setup.prepare(parse_settings(world.config, ("--seed", "5")))
    notes = {"base": run.origin["base"], "task": run.metadata["task"], "settings": run.settings.to_json()}
    save_adapter(
        world.directory / "adapter", run.parts.trainable, run.parts.specs, run.settings.applied, **notes
    )
    template = language.TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    (world.directory / "template.jinja").write_text(template)
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    return world


@pytest.fixture(scope="module")
def settings_of(home):
    """Settings from overrides, each with an output directory of its own."""
    numbers = itertools.count()

    def settings(*overrides):
        out = ("--output_dir", str(home.directory / f"run{next(numbers)}"))
        return parse_settings(home.config, (*out, *(word.format(dir=home.directory) for word in overrides)))

    return settings


@pytest.fixture(scope="module")
def found_on(settings_of):
    """What a proof finds on a base."""
    return functools.cache(lambda proof, base: proof(settings_of(*base)))


def test_every_field_has_its_proof():
    proved = {change.name for change in CHANGES}
    assert proved | ELSEWHERE.keys() == {field.name for field in setting_fields()}
    assert not proved & ELSEWHERE.keys()
    for name, file in ELSEWHERE.items():
        assert name.rpartition(".")[2] in (Path(__file__).parent / file).read_text(), name


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change.name}-{change.proof.__name__}")
def test_changing_a_field_changes_something(settings_of, found_on, change):
    changed = change.proof(settings_of(*change.base, f"--{change.name}", change.value))
    assert changed != found_on(change.proof, change.base)


def test_each_proof_finds_the_same_again(settings_of, found_on):
    """Else a difference would prove nothing."""
    for proof, base in {change.proof: change.base for change in CHANGES}.items():
        assert proof(settings_of(*base)) == found_on(proof, base), proof
