"""The kinds of run whose properties are proved: each is trained once in a process, and `properties.py` compares."""

import contextlib
import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax import load_adapter
from loraplus_jax.cli.commands import main
from loraplus_jax.training import console, trainer

from .. import tiny
from ..messages import assert_mentions
from .gpt2_world import write_gpt2
from .language_world import FUSED, PRODUCTS, write_family
from .runs import MESH, NO_PROMPT, PROMPT, SHORT, SHORT_TALK, column, flags, rows_of, summary_of, tensors_of

DRAW = trainer.draw_loss


def nothing(_):
    """Of a kind that promises no more than its properties."""


BOTH = ("peft", "merged")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a run is trained, and what its properties are proved with."""

    flags: tuple[str, ...] = SHORT_TALK
    first: str = "first_talk"
    """The fixture of its world."""
    make: Callable = nothing
    """Changes a copy of that world."""
    picture: bool = False
    falls: float = 0.9
    """Which part of the loss is left at most; any of a run that is too short to learn."""
    stop: int = 6
    """The step at which it is interrupted."""
    otherwise: tuple[str, ...] = MESH
    """Settings that change how its numbers are computed, but not the numbers."""
    rel: float = 1e-4
    exports: tuple[str, ...] = BOTH
    """Those that evaluate as the run does."""
    answers: tuple[str, ...] = ()
    """Those that also answer as the run does."""
    extra: Callable = nothing
    """What else is true of the run."""


EXPORTS = {"peft": (), "merged": ("--merged",), "same": ("--merged", "--dequantized")}


def said(*arguments):
    """What a command prints; it must end well."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(a) for a in arguments]) == 0
    return out.getvalue()


class Run:
    """A run of a kind, its exports and what these say, each made when it is first asked for."""

    def __init__(self, kind, first, directory: Path, of):
        self.kind, self.directory, self.of = kind, directory, of
        self.world = first.copy(directory / "world")
        kind.make(self.world)
        self._copies = 0

    def fresh(self):
        """A copy of the world without a run in it."""
        self._copies += 1
        return self.world.copy(self.directory / f"copy{self._copies}")

    @functools.cached_property
    def finished(self) -> Any:
        """A world with the run in it, to be read only."""
        world = self.fresh()
        with pytest.MonkeyPatch.context() as patch, world.printed.open("w") as file:
            # Pictures take as long as all else.
            patch.setattr(trainer, "draw_loss", DRAW if self.kind.picture else lambda *_: None)
            patch.setattr(console, "SECONDS_PER_LINE", 0.0)
            with contextlib.redirect_stdout(file):
                world.trained(*self.kind.flags)
        return world

    @property
    def straight(self):
        """The directory of the run that nothing disturbs."""
        return self.finished.out

    @functools.cached_property
    def summary(self):
        return summary_of(self.straight)

    @functools.cached_property
    def exact(self):
        """What `loraplus eval` says of the run."""
        return json.loads(said("eval", self.straight))

    def export(self, name):
        """Where the run is exported to."""
        return self._exported(name)[0]

    def words(self, name):
        """What that export prints."""
        return self._exported(name)[1]

    @functools.cache  # noqa: B019, a run lives as long as the process
    def _exported(self, name):
        to = self.directory / name
        return to, said("export", self.straight, "--to", to, *EXPORTS[name])

    def answer(self, place=None):
        """What the world's question is answered with."""
        command, out, *question = self.finished.ask
        return said(command, place or out, *question)


def before_of(name, rel=1e-5):
    """The run starts with the loss of another one."""

    def check(run):
        before = run.of(name).summary["before"]
        assert run.summary["before"]["loss"] == pytest.approx(before["loss"], rel=rel)

    return check


def ranks(rank):
    """The run starts as its base, with saved factors of this rank."""

    def check(run):
        before_of("chat")(run)
        assert {spec.rank for spec in load_adapter(run.straight / "adapter").specs.values()} == {rank}

    return check


def weights_of(directory):
    return load_file(directory / "model.safetensors")


def assert_merged(run, module, base):
    """The merged weight of a module is the base's with PEFT's product added; `base` is its name in the base."""
    options = json.loads((run.export("peft") / "adapter_config.json").read_text())
    factors = load_file(run.export("peft") / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    change = options["lora_alpha"] / options["r"] * b @ a
    merged = weights_of(run.export("merged"))
    key = next(key for key in merged if key.endswith(f"{base}.weight"))
    expected = weights_of(run.world.model)[f"{base}.weight"] + (
        change.T if options["fan_in_fan_out"] else change
    )
    np.testing.assert_allclose(merged[key], expected, rtol=0, atol=1e-5)
    return options, a, b


def full(run):
    assert run.summary["trainable"] == run.summary["total"]
    tensors = tensors_of(run.straight)
    assert not any(name.startswith("lora") for name in tensors)
    old = weights_of(run.world.model)
    for ours, theirs in [("query", "attention.self.query"), ("up", "intermediate.dense")]:
        name = next(name for name in tensors if name.endswith(f"{ours}/kernel"))
        assert np.all(old[f"encoder.layer.0.{theirs}.weight"] != tensors[name][0].T)


def bf16(run):
    """Near float32, with adapters in float32."""
    assert {tensor.dtype for tensor in tensors_of(run.straight).values()} == {np.dtype("float32")}
    wide = run.of("bert").straight
    for name in ("loss", "before/test/loss"):
        found = column(run.straight, name)
        expected = {step: column(wide, name)[step] for step in found}
        assert found == pytest.approx(expected, abs=0.05)
        assert found != expected


def chat(run):
    """The run's numbers and answers."""
    summary, out = run.summary, run.straight
    before, after = summary["before"], summary["after"]
    assert after["loss"] < 1 < 5 < before["loss"]
    assert set(before) == set(after) == {"loss", "perplexity"}
    for values in (before, after):
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-6)
    assert summary["held_out"] == {"split": "test", "examples": 24}
    answers = summary["answers"]
    assert (answers["prompt"], answers["after"]) == (PROMPT, "it is white")
    assert answers["before"] != answers["after"]
    text = run.finished.printed.read_text()
    for when in ("before: ", "after:  "):
        assert f"> {PROMPT}\n{when}{answers[when.strip(': ')]}" in text
    assert "data: 84 train, 12 validation, 24 test" in text.splitlines()
    assert run.answer().partition("\n")[2] == "it is white\n\n"
    assert list(column(out, "loss")) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert list(column(out, "validation/perplexity")) == [20, 40]
    for name, when in (("before/test/perplexity", "before"), ("test/perplexity", "after")):
        assert [*column(out, name).values()] == [summary[when]["perplexity"]]
    # Every product of the layers at rank 4: q, k, v, o, gate, up, down; in all also the base.
    assert summary["trainable"] == 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    base = sum(tensor.size for tensor in weights_of(run.world.model).values())
    assert summary["total"] == summary["trainable"] + base


def theory(layers, steps):
    """The theory's terms are in rows of their own at these steps, read at the end, and change no other row."""

    def check(run):
        rows = [row for row in rows_of(run.straight) if any(name.startswith("theory/") for name in row)]
        assert [row["step"] for row in rows] == steps
        terms = ("delta1", "delta2", "delta3", "z_a", "z_b")
        names = {f"theory/{layer}/{term}" for layer in (*layers, "mean") for term in terms}
        assert all(row.keys() == names | {"step"} for row in rows)
        assert all(value > 0 for row in rows for value in row.values())
        assert f"theory: {run.summary['theory']}" in run.finished.printed.read_text().splitlines()
        assert column(run.straight, "loss")[5] == column(run.of("bert").straight, "loss")[5]

    return check


def packed(run):
    """Packed rows evaluate as others do."""
    wide = run.of("chat").summary
    assert run.summary["before"] == pytest.approx(wide["before"], rel=1e-5)
    assert run.summary["held_out"] == wide["held_out"]
    assert "packed" in run.finished.printed.read_text()


def nf4(run):
    """The export says what merging into the original weights, which the quantized ones round, changes."""
    name = "model.layers.0.mlp.up_proj"
    assert_merged(run, name, name)
    merged, same, original = (
        weights_of(directory) for directory in (run.export("merged"), run.export("same"), run.world.model)
    )
    assert run.summary["total"] == run.summary["trainable"] + sum(x.size for x in original.values())
    names = [name for name in original if "proj" in name]
    lost = sum(np.square(same[n] - merged[n]).sum() for n in names)
    share = np.sqrt(lost / sum(np.square(original[n]).sum() for n in names))
    assert_mentions(run.words("same"), f"{share:.2%}", "packed")
    assert json.loads(said("eval", run.export("merged")))["loss"] != pytest.approx(
        run.exact["loss"], rel=1e-4
    )


def dora(run):
    """It starts as its base, and trains magnitudes."""
    before_of("nf4", rel=1e-6)(run)
    assert any("magnitude" in name for name in tensors_of(run.straight))


def loftq(run):
    """PEFT's factors and the merged weights are of the original weights, so they agree with each other."""
    name = "model.layers.0.self_attn.q_proj"
    assert_merged(run, name, name)
    peft, merged = (json.loads(said("eval", run.export(name)))["loss"] for name in ("peft", "merged"))
    assert peft == pytest.approx(merged, rel=1e-5)


def adalora(run):
    """The ranks reach the target, are reported, and are what PEFT gets."""
    found = {module: np.ravel(value) for module, value in run.summary["ranks"].items()}
    assert sum(map(sum, found.values())) == 2 * sum(map(len, found.values()))
    assert len({int(rank) for values in found.values() for rank in values}) > 1
    lora = load_adapter(run.straight / "adapter").lora["layers"]["self_attn"]
    for name, pair in lora.items():
        counts = (np.asarray(pair["lora_b"]) != 0).any(-1).sum(-1)
        assert counts.tolist() == found[f"layers/self_attn/{name}"].tolist()
    config = json.loads((run.export("peft") / "adapter_config.json").read_text())
    written = {max(1, rank) for rank in config["rank_pattern"].values()}
    assert written | {config["r"]} >= {max(1, int(r)) for values in found.values() for r in values}


def gpt2(world):
    write_gpt2(world.model)
    world.change_config("lora", target_modules=["c_attn", "attn/c_proj", "c_fc", "mlp/c_proj"])
    world.change_config("data", template="plain", max_length=48)


def conv1d(run):
    """GPT-2's matrices are transposed."""
    assert run.summary["trainable"] == 2 * 4 * (32 + 96 + 32 + 32 + 32 + 48 + 48 + 32)
    options, a, b = assert_merged(run, "transformer.h.1.attn.c_attn", "h.1.attn.c_attn")
    assert (options["fan_in_fan_out"], a.shape, b.shape) == (True, (4, 32), (96, 4))
    config = json.loads((run.export("merged") / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]


def keys_are_the_bases(run):
    """Queries and values alone are adapted, in one matrix with the keys."""
    assert run.summary["trainable"] == 2 * 4 * 2 * (32 + 32)
    options = json.loads((run.export("peft") / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in options["target_modules"]} == {"c_attn"}
    assert (options["fan_in_fan_out"], options["r"], options["rank_pattern"]) == (True, 8, {})
    merged = weights_of(run.export("merged"))
    for name, weight in weights_of(run.world.model).items():
        columns = slice(32, 64) if name.endswith("c_attn.weight") else slice(None)
        np.testing.assert_array_equal(merged[name][..., columns], weight[..., columns])
        assert np.array_equal(merged[name], weight) != name.endswith("c_attn.weight")


def family(name):
    def make(world):
        write_family(world.model, name)
        world.change_config("lora", target_modules=[*FUSED] if name == "phi3" else PRODUCTS)

    return make


def mixture(name):
    """The experts are adapted as parameters, their router too."""

    def make(world):
        write_family(world.model, name)
        world.change_config(
            "lora",
            target_modules=[f"{letter}_proj" for letter in "qkvo"] + ["mlp/gate"],
            target_parameters={".*/experts/.*": "leio"},
        )

    return make


def converts_to_ours_alone(run):
    """Experts are parameters, which have no module of their own in the base's file."""
    peft, out = run.export("peft"), run.directory / "converted"
    arguments = ["convert", str(peft), "--base", str(run.world.model), "--out"]
    assert "differ by at most 0 " in said(*arguments, out / "ours", "--to", "loraplus")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([*arguments, str(out / "theirs"), "--to", "merged"]) == 2
    assert_mentions(err.getvalue(), "experts", "loraplus export", "--merged")


def modernbert(world):
    """The recipe of BERT's world, whose words it keeps."""
    names = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "max_position_embeddings")
    sizes = json.loads((world.model / "config.json").read_text())
    content = tiny.config("modernbert", **{name: sizes[name] for name in names})
    (world.model / "config.json").write_text(json.dumps(content))
    save_file(tiny.tensors(content, seed=1), world.model / "model.safetensors")


def names_its_targets(run):
    options = json.loads((run.export("peft") / "adapter_config.json").read_text())
    names = {name.rpartition(".")[2] for name in options["target_modules"]}
    assert names == {*FUSED}


def choices(world):
    world.change_config(task="multiple_choice")
    world.change_config("data", path=str(world.directory / "questions.jsonl"))


FIRST = (*NO_PROMPT, *SHORT, *flags("--lora.rank 4 --optimizer.learning_rate 1e-3"))
NF4 = ("--model.quantize", "nf4")
LOFTQ = (*NF4, "--lora.init", "loftq")
SPLIT = (*SHORT_TALK, *flags("--model.split_fused true --lora.target_modules [q_attn,v_attn]"))
OTHERWISE = flags("--model.remat dots --model.attention blocked --model.loss_chunk 7")
PACKED = flags(
    "--data.packing true --data.max_length 64 --lora.dropout 0.1 --train.accumulate 2 --train.batch_size 8"
    " --train.eval_batch_size 8 --train.steps 20 --train.eval_every 8 --train.log_every 4"
    " --optimizer.schedule linear --optimizer.weight_decay 0.01"
)
ADALORA = flags(
    "--train.steps 12 --train.eval_every 6 --train.select last --lora.rank 6 --optimizer.target_rank 2"
    " --optimizer.learning_rate 1e-2"
)
BERT_LAYERS = [
    f"encoder/layers/{n}/{i}" for n in ("attention/query", "attention/value", "mlp/up") for i in (0, 1)
]


def bert(text, **fields):
    return Kind(flags(text), "first_world", **fields)


def init(name, rank, **fields):
    """Adapters that start from the weights, at a small rate."""
    return Kind((*FIRST, "--lora.init", name), falls=0.99, extra=ranks(rank), **fields)


KINDS = {
    "bert": bert(
        "",
        picture=True,
        otherwise=flags("--mesh.data 8 --train.accumulate 4 --train.steps 20"),
        rel=1e-5,
    ),
    "full": bert("--method full --train.steps 8", falls=math.inf, exports=("merged",), extra=full),
    "bf16": bert(
        "--train.steps 10 --model.dtype bfloat16 --model.param_dtype bfloat16", falls=math.inf, extra=bf16
    ),
    "theory": bert(
        "--train.steps 8 --train.eval_every 4 --train.theory_every 3",
        falls=math.inf,
        extra=theory(BERT_LAYERS, [3, 6]),
    ),
    "chat": Kind((), answers=BOTH, extra=chat),
    "llama": Kind(otherwise=(*MESH, *OTHERWISE), exports=("peft",), answers=("peft",)),
    "packed": Kind((*NO_PROMPT, *PACKED), stop=13, extra=packed),
    "nf4": Kind((*SHORT_TALK, *NF4), exports=("peft", "same"), extra=nf4),
    "dora": Kind((*SHORT_TALK, *NF4, "--lora.variant", "dora"), exports=("peft", "same"), extra=dora),
    "pissa": init("pissa", 8),
    "lora_ga": init("lora_ga", 8),
    "loftq": Kind((*FIRST, *LOFTQ), falls=0.99, exports=("same",), extra=loftq),
    "adalora": Kind((*NO_PROMPT, *ADALORA), stop=7, extra=adalora),
    "gpt2": Kind(make=gpt2, answers=BOTH, extra=conv1d),
    "gpt2_split": Kind(SPLIT, make=gpt2, falls=1, extra=keys_are_the_bases),
    "gpt2_loftq": Kind((*SPLIT, *LOFTQ), make=gpt2, falls=1, exports=("same",)),
    "gemma3": Kind(make=family("gemma3_text"), answers=BOTH),
    "olmo3": Kind(make=family("olmo3"), answers=BOTH),
    "smollm3": Kind(make=family("smollm3"), answers=BOTH),
    "qwen3_moe": Kind(make=mixture("qwen3_moe"), answers=BOTH),
    "mixtral": Kind(make=mixture("mixtral"), answers=BOTH, extra=converts_to_ours_alone),
    "mixtral_nf4": Kind((*SHORT_TALK, *NF4), make=mixture("mixtral"), exports=("peft", "same")),
    "phi3": Kind(make=family("phi3"), answers=BOTH, extra=names_its_targets),
    "modernbert": bert("", make=modernbert, otherwise=flags("--mesh.data 8 --train.accumulate 4"), rel=1e-5),
    "describe": Kind(
        ("--train.steps", "60"),
        make=lambda world: world.describe(
            beams=3, max_new_tokens=8, no_repeat_ngram=3, inputs=6, batch_size=4
        ),
        stop=50,
    ),
    "choices": Kind((*NO_PROMPT, "--train.steps", "80"), make=choices),
}


def runs_of(first, directory):
    """A function from the name of a kind to its run; `first` are the worlds by their fixture."""

    @functools.cache
    def of(name):
        return Run(KINDS[name], first[KINDS[name].first], directory / name, of)

    return of
