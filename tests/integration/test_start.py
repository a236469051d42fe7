"""Runs whose adapters start from the base: they begin with its function, and what they save is for all of it."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax.cli.commands import main
from loraplus_jax.interop.adapter_files import load_adapter
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training.setup import prepare

from ..messages import assert_mentions
from .test_run import column, interrupt_at, printed_json, summary_of, tensor_bytes
from .test_sweep import report_of

pytestmark = pytest.mark.usefixtures("cache")

SHORT = (
    *(
        "--train.prompt",
        "null",
        "--train.prompt_tokens",
        "64",
        "--train.steps",
        "8",
        "--train.eval_every",
        "4",
    ),
    *("--train.log_every", "2", "--lora.rank", "4", "--optimizer.learning_rate", "1e-3"),
)
PISSA = (*SHORT, "--lora.init", "pissa")
LOFTQ = (*SHORT, "--lora.init", "loftq", "--model.quantize", "nf4")


@pytest.fixture(scope="module")
def before(first_talk, tmp_path_factory, cache_directory):
    """The evaluation of the base, before training."""
    out = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLUS_CACHE", str(cache_directory))
        first_talk.trained(*SHORT, out=out)
    return summary_of(out)["before"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "init",
    [
        "pissa",
        "lora_ga",
        pytest.param("olora", marks=pytest.mark.long),
        pytest.param("orthogonal", marks=pytest.mark.long),
    ],
)
def test_the_start_is_the_base_and_the_saved_adapter_what_was_trained(talk, tmp_path, capsys, before, init):
    run = talk.trained(*SHORT, "--lora.init", init)
    summary = summary_of(run)
    assert summary["before"]["loss"] == pytest.approx(before, rel=1e-5)
    assert summary["after"]["loss"] < 0.99 * before
    saved = load_adapter(run / "adapter")
    assert {spec.rank for spec in saved.specs.values()} == {4 if init == "orthogonal" else 8}
    capsys.readouterr()
    assert printed_json(capsys, "eval", str(run))["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)
    for more in (), ("--merged",):
        to = tmp_path / f"exported{len(more)}"
        assert main(["export", str(run), "--to", str(to), *more]) == 0
        capsys.readouterr()
        assert printed_json(capsys, "eval", str(to))["loss"] == pytest.approx(
            summary["after"]["loss"], rel=1e-5
        )


@pytest.mark.slow
def test_lora_one_starts_with_a_step(talk, capsys, before):
    run = talk.trained(*SHORT, "--lora.init", "lora_one")
    summary = summary_of(run)
    assert summary["before"]["loss"] < 0.999 * before
    assert {spec.rank for spec in load_adapter(run / "adapter").specs.values()} == {4}
    capsys.readouterr()
    assert printed_json(capsys, "eval", str(run))["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [PISSA, pytest.param(LOFTQ, marks=pytest.mark.long)])
def test_a_run_resumes_from_its_saved_start(talk, tmp_path, flags, capsys):
    straight = talk.trained(*flags, out=tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        assert talk.train(*flags) == 130
    # Another start than this machine would make again, as another machine might.
    start = talk.out / "start/adapter.safetensors"
    saved = start.read_bytes()
    assert talk.train(*flags) == 0
    assert start.read_bytes() == saved
    assert tensor_bytes(talk.out) == tensor_bytes(straight)
    start.write_bytes(saved[:-8])
    capsys.readouterr()
    assert talk.train(*flags, "--train.select", "last") == 2
    assert_mentions(capsys.readouterr().err, start, "damaged")


@pytest.mark.slow
def test_eight_devices_and_one_agree(talk, tmp_path):
    flags = (*SHORT, "--lora.init", "lora_ga")  # whose gradient is of all devices
    one = talk.trained(*flags, out=tmp_path / "one")
    many = talk.trained(*flags, "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    for step, loss in column(one, "loss").items():
        assert column(many, "loss")[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_loftq_starts_nearer_to_the_unpacked_model(talk, tmp_path, capsys, before):
    packed = summary_of(talk.trained(*SHORT, "--model.quantize", "nf4", out=tmp_path / "plain"))
    run = talk.trained(*LOFTQ)
    summary = summary_of(run)
    weights = weights_at_the_start(talk, *LOFTQ)
    plain = weights_at_the_start(talk, *SHORT, "--model.quantize", "nf4")
    wide = weights_at_the_start(talk, *SHORT)
    for name, weight in wide.items():
        lost = np.linalg.norm(plain[name] - weight)
        assert np.linalg.norm(weights[name] - weight) < 0.8 * lost, name
    assert packed["before"]["loss"] != pytest.approx(summary["before"]["loss"], rel=1e-6)
    capsys.readouterr()
    after = summary["after"]["loss"]
    assert printed_json(capsys, "eval", str(run))["loss"] == pytest.approx(after, rel=1e-5)
    # Merged into the packed weights it is what was trained; on the original it is the change since the start.
    assert main(["export", str(run), "--merged", "--dequantized", "--to", str(tmp_path / "same")]) == 0
    capsys.readouterr()
    assert printed_json(capsys, "eval", str(tmp_path / "same"))["loss"] == pytest.approx(after, rel=1e-5)
    assert main(["export", str(run), "--merged", "--to", str(tmp_path / "merged")]) == 0
    saved = load_adapter(run / "adapter")
    merged, original = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", talk.model))
    factors, start = (tree["layers"]["self_attn"]["q_proj"] for tree in (saved.lora, saved.start))
    scale = saved.specs["layers/self_attn/q_proj"].scale
    change = scale * sum(sign * x["lora_a"][0] @ x["lora_b"][0] for x, sign in ((factors, 1), (start, -1)))
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(merged[name] - original[name], np.asarray(change).T, atol=1e-5)
    assert main(["export", str(run), "--to", str(tmp_path / "peft")]) == 0
    peft = load_file(tmp_path / "peft/adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    peft_change = scale * peft[f"{key}.lora_B.weight"] @ peft[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(peft_change, np.asarray(change).T, atol=1e-5)


def weights_at_the_start(talk, *flags):
    """The adapted weights that the model computes with before the first step."""
    parts = prepare(parse_settings(talk.config, flags)).parts
    params = parts.frozen["params"]["layers"]["self_attn"]
    found = {}
    for name, pair in parts.trainable["lora"]["layers"]["self_attn"].items():
        leaf = params[name]["kernel"]
        wide = leaf.dequantize() if hasattr(leaf, "dequantize") else leaf
        spec = parts.specs[f"layers/self_attn/{name}"]
        found[name] = np.asarray(wide) + spec.scale * np.asarray(pair["lora_a"] @ pair["lora_b"])
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("flags", [PISSA, LOFTQ])
def test_a_member_of_a_sweep_is_the_run_with_its_settings(talk, tmp_path, flags):
    search = (
        "--sweep.learning_rates",
        "[2e-4,5e-4]",
        "--sweep.lr_ratios",
        "[4]",
        "--sweep.report_seeds",
        "2",
    )
    shared = [flag for flag in flags if flag not in ("--optimizer.learning_rate", "1e-3")]
    more = ("--sweep.rungs", "[0.5]", "--sweep.keep", "0.5", "--sweep.control", "false")
    assert (
        main(["sweep", str(talk.config), "--output_dir", str(tmp_path / "sweep"), *shared, *search, *more])
        == 0
    )
    report = report_of(tmp_path / "sweep")
    run = next(run for run in report["runs"] if run["arm"] == "lora_plus")
    rate = str(report["chosen"]["lora_plus"]["learning_rate"])
    seed = str(run["seed"])
    one = talk.trained(*shared, "--seed", seed, "--optimizer.learning_rate", rate, "--lora.lr_ratio", "4")
    assert summary_of(one)["after"]["loss"] == pytest.approx(run["curve"][-1][1], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lora.init", "pissa"), ("sweep.control", "false", "pissa")),
        (("--lora.init", "lora_ga"), ("lora.init", "lora_ga", "seed")),
        (("--lora.init", "pissa", "--sweep.ranks", "[2,4]"), ("sweep.ranks", "null", "pissa")),
    ],
)
def test_bad_sweeps(talk, capsys, flags, words):
    assert main(["sweep", str(talk.config), "--output_dir", str(talk.out), *flags]) == 2
    assert_mentions(capsys.readouterr().err, *words)
    assert not talk.out.exists()
