"""Which YAML is read."""

import pytest

from loraplus_jax._utils.yaml_files import read_yaml, to_yaml

from ..messages import mentions
from ..refusals import refusals
from .values import parsed, parsing


@pytest.mark.parametrize("number", ["5e-4", "5.e-4", "0.5e-3", ".5e-3", "50E-5", "0.05e-2"])
def test_every_spelling_of_an_exponent_is_a_number(tmp_path, number):
    content = f"model: {{path: m}}\ndata: {{path: d}}\noutput_dir: o\noptimizer: {{eps: {number}}}\n"
    assert parsed(tmp_path, content=content).optimizer.eps == 5e-4
    assert parsed(tmp_path, "--lora.alpha", "1.5e1").lora.alpha == 15


@pytest.mark.parametrize(
    "text", ["5e-4", "1.5e4", ".5e3", "5e-4_lora", "1.5e4-run", "1e4 and more", "1.5", "null"]
)
def test_texts_like_numbers_are_read_back(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(to_yaml({"output_dir": text, "seed": 3}))
    assert read_yaml(path) == {"output_dir": text, "seed": 3}


def test_a_text_that_starts_like_a_number_is_a_text(tmp_path):
    content = "model: {path: m}\ndata: {path: d}\noutput_dir: 5e-4_lora\n"
    assert parsed(tmp_path, content=content).output_dir == "5e-4_lora"


def test_a_config_in_utf_16_is_named_as_such(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n", encoding="utf-16")
    with pytest.raises(ValueError, match=mentions("config.yaml", "UTF-16", "UTF-8")):
        read_yaml(tmp_path / "config.yaml")


test_files_that_are_rejected = refusals(
    *(
        (parsing(content=content), "config.yaml", *words)
        for content, *words in [
            ("a: [\n", "YAML"),
            ("a: !!python/name:os.system\n", "YAML"),
            ("a: !!bool x\n", "YAML"),
            ("a: !!timestamp x\n", "YAML"),
            ("a: !!int ''\n", "YAML"),
            ("a: !!set [x]\n", "YAML"),
            ("a: 2001-99-99\n", "YAML", "month"),
            (f"a: {'9' * 5000}\n", "config.yaml:1:4", "YAML", "5,000 digits", "4,300"),
            ("a: " + "[" * 3000 + "]" * 3000, "YAML", "recursion"),
            ("a: " + "[" * 150 + "]" * 150, 100),
            ('a: "\\ud800"\n', "surrogate"),
            ("a: &x [1, 1]\nb: [*x, *x]\n", "config.yaml:2:5", "YAML", "aliases"),
            *(
                (f"seed: {number}\n", "config.yaml:1:7", number, "decimal")
                for number in ("010", "1_0", "0x3", "0b11", "1:30", "-007", "1_0.5")
            ),
            ("a: 1" + " " * 2**16, 65540, 65536),
        ]
    )
)
