"""Which YAML is read."""

import pytest

from .values import parsed


def test_exponents_without_a_point_are_numbers(tmp_path):
    content = "model: {path: m}\ndata: {path: d}\noutput_dir: o\noptimizer: {learning_rate: 5e-4}\n"
    assert parsed(tmp_path, content=content).optimizer.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [\n", ["config.yaml is not YAML"]),
        ("a: !!python/name:os.system\n", ["config.yaml is not YAML"]),
        ("a: !!bool x\n", ["config.yaml is not YAML"]),
        ("a: !!timestamp x\n", ["config.yaml is not YAML"]),
        ("a: !!int ''\n", ["config.yaml is not YAML"]),
        ("a: !!set [x]\n", ["config.yaml is not YAML"]),
        ("a: 2001-99-99\n", ["config.yaml is not YAML", "month"]),
        (f"a: {'9' * 5000}\n", ["config.yaml is not YAML", "digits"]),
        ("a: " + "[" * 3000 + "]" * 3000, ["config.yaml is not YAML", "recursion"]),
        ("a: " + "[" * 150 + "]" * 150, ["config.yaml is nested more than 100 deep"]),
        ('a: "\\ud800"\n', ["config.yaml holds half a surrogate pair"]),
        ("a: &x [1, 1]\nb: [*x, *x]\n", ["config.yaml is not YAML", "aliases are not read", "line 2"]),
        ("a: 1" + " " * 2**16, ["config.yaml has 65540 bytes, at most 65536 are read"]),
    ],
)
def test_files_that_are_rejected(tmp_path, content, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        parsed(tmp_path, content=content)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
