"""The comparison of a converted adapter with its source."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax.inference.named_base import named_base
from loraplus_jax.inference.verify_conversion import (
    ConversionFailed,
    compare,
    compare_layers,
    is_known,
    layer_outputs,
    opened_logits,
    our_logits,
    token_ids,
    torch_logits,
)
from loraplus_jax.models.files import open_files

from ..integration.gpt2_world import write_gpt2
from ..messages import mentions
from .conversions import modules_of, write_base, write_peft

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama")


def test_differences_are_relative_to_the_largest_output():
    """The outputs differ from one another, so that another order or shape of the same values is seen."""
    source, one = np.array([[25.0, -100.0, 50.0]]), np.array([[0.0, 0.0, 1.0]])
    verified = compare("logits", "us", 0 * source, source, source + 5e-4 * one, 1e-5)
    assert (verified.size, verified.effect) == (100, 100)
    assert verified.difference == pytest.approx(5e-4)
    with pytest.raises(ConversionFailed, match=mentions("logits", "0.002", "100")):
        compare("logits", "us", 0 * source, source, source - 2e-3 * one, 1e-5)
    with pytest.raises(ConversionFailed, match=mentions("25", "100")):
        compare("logits", "us", 0 * source, source, source[:, ::-1], 1e-5)
    for target in (source[0], source.T, source[:, :2]):
        with pytest.raises(ConversionFailed, match=mentions(source.shape, target.shape)):
            compare("logits", "us", 0, source, target, 1e9)
    # Of an adapter that changes an output by 1, half a percent of the change is little, and all of it is not.
    plain = source - one
    assert compare("logits", "us", plain, source, source + 5e-3 * one, 1e-5, 5e-3).effect == 1
    with pytest.raises(ConversionFailed, match="changes"):
        compare("logits", "us", plain, source, plain, 1e-5, 5e-3)
    with pytest.raises(ConversionFailed):
        compare("logits", "us", 0, source, np.nan * source, 1.0)


def test_ids_are_always_the_same():
    assert token_ids(50).tolist() == token_ids(50).tolist()
    assert (token_ids(50).shape, token_ids(50).max() < 50) == ((2, 16), True)


@pytest.mark.slow
def test_a_replaced_tensor_is_used(base):
    plain, name = our_logits(named_base(open_files(base))), "model.layers.1.mlp.down_proj.weight"
    changed = {name: load_file(base / "model.safetensors")[name] + 0.1}
    assert np.abs(our_logits(named_base(open_files(base)), changed) - plain).max() > 0.01
    np.testing.assert_array_equal(opened_logits(base), plain)
    with pytest.raises(ValueError, match=mentions("model.other.weight")):
        our_logits(named_base(open_files(base)), {"model.other.weight": np.ones(2)})


@pytest.mark.slow
def test_gpt2_splits_its_tensors(tmp_path):
    write_gpt2(tmp_path)
    name = "h.0.attn.c_attn.weight"
    changed = load_file(tmp_path / "model.safetensors")[name].copy()
    changed[:, 64:] *= 1.5  # values alone
    assert (
        np.abs(
            our_logits(named_base(open_files(tmp_path)), {name: changed})
            - our_logits(named_base(open_files(tmp_path)))
        ).max()
        > 0.01
    )


def test_single_layers(base):
    named = named_base(open_files(base))
    name = "model.layers.0.mlp.up_proj.weight"
    plain = layer_outputs([(name, named.tensors[name][:])])
    twice = layer_outputs([(name, 2 * named.tensors[name][:])])
    np.testing.assert_allclose(twice[name], 2 * plain[name], rtol=1e-6)
    assert is_known(named)
    classifier = {"architectures": ["LlamaForSequenceClassification"]}
    assert not is_known(named._replace(config=named.config | classifier))


def test_each_layer_is_compared_on_its_own(base):
    """A wrong change of a layer with small weights would be rounding beside the outputs of another."""
    named, (up, down) = (
        named_base(open_files(base)),
        (f"model.layers.0.mlp.{x}_proj.weight" for x in ("up", "down")),
    )
    source = {up: 1e6 * named.tensors[up][:], down: 1.5 * named.tensors[down][:]}
    exact = lambda _: 1e-5  # noqa: E731
    verified = compare_layers(named, source.items(), reversed(source.items()), exact, 0.0)
    assert (verified.difference, verified.what) == (0, "outputs of the layers")
    for target in ({**source, down: 1.51 * named.tensors[down][:]}, {up: source[up]}):
        with pytest.raises(ConversionFailed, match=mentions(down)):
            compare_layers(named, source.items(), target.items(), exact, 0.0)
    # What neither changes is the base's.
    plain = {"model.norm.weight": named.tensors["model.norm.weight"][:]}
    assert compare_layers(named, source.items(), (source | plain).items(), exact, 0.0).difference == 0
    with pytest.raises(ConversionFailed, match=mentions("model.norm.weight")):
        compare_layers(
            named, source.items(), (source | {n: x + 1 for n, x in plain.items()}).items(), exact, 0.0
        )


@pytest.mark.slow
def test_transformers_and_peft_compute_the_same(base, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    changed = {name: load_file(base / "model.safetensors")[name] + 0.1}
    for tensors in ({}, changed):
        np.testing.assert_allclose(
            torch_logits(named_base(open_files(base)), changed=tensors),
            our_logits(named_base(open_files(base)), tensors),
            atol=2e-5,
        )
    adapter = write_peft(tmp_path / "peft", modules_of(base, "q_proj"), base)
    np.testing.assert_allclose(
        torch_logits(named_base(open_files(base)), adapter=adapter), opened_logits(adapter), atol=2e-5
    )
