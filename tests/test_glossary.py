"""The field's words: phrases that readers stumbled over stay out of the package, the docs and the README."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Phrase to what to write instead.
GLOSSARY = {
    r"goes? on( from| with|;|\.|,)|going on": "resume, continue",
    r"refus(e|es|ed|al)": "raise, reject, unsupported",
    r"(what|is|are) odd|odd value": "invalid, unexpected",
    r"strangers?": "untrusted",
    r"exchange between": "collectives, communication",
    r"in its words": "every process raises the same error",
    r"at once, by": "peak memory",
    r"bind(s)? the step|bytes accessed bind": "HBM-bound",
    r"lacks its evaluation": "pending evaluation",
    r"set aside": "quarantine, rename",
    r"look(s|ed|ing)? at": "check, inspect",
    r"speaks of": "looks like a LoRA factor",
    r"tells no side": "does not say whether it is A or B",
    r"terms? alone": "low-rank term only",
    r"to the bit": "bit-identical, bitwise",
    r"surely": "significant",
    r"no sure": "no significant difference",
    r"to the digits shown": "matches to four digits",
    r"fetch(es)? a name": "download",
    r"run like it": "a training config with the same data and task",
    r"counted in rows": "batch size counts packed rows",
    r"(is|are|was|were) cut\b": "truncated",
    r"in (its|their) turn": "evaluated separately",
    r"starves?": "is under-trained",
    r"no opponent": "is not a fair baseline",
    r"a setting less": "one fewer hyperparameter",
}
FILES = [
    *(ROOT / "loraplus_jax").rglob("*.py"),
    *(ROOT / "loraplus_jax").rglob("*.html"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "configs").glob("*.yaml"),
    *(ROOT / "examples").glob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]


def hits(pattern, text):
    """Line numbers and lines in which a phrase stands."""
    found = re.finditer(rf"\b(?:{pattern})", text, flags=re.IGNORECASE)
    return [f"{text.count(chr(10), 0, m.start()) + 1}: {m[0]}" for m in found]


@pytest.mark.parametrize("pattern", GLOSSARY)
def test_the_fields_words(pattern):
    wrong = {
        str(path.relative_to(ROOT)): lines
        for path in FILES
        if (lines := hits(pattern, path.read_text(encoding="utf-8")))
    }
    assert not wrong, f"write instead: {GLOSSARY[pattern]}"


def test_the_lint_sees_a_phrase_across_lines():
    assert hits(next(iter(GLOSSARY)), "it goes on from there") == ["1: goes on from"]
