"""The code of the documentation's pages, as a reader sees it."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def variants(text):
    """A page as its reader sees it with each of its tabs, by the tab's name."""
    names = sorted(set(re.findall(r"^:::{tab-item} (\w+)$", text, flags=re.M)))
    others = r"^:::{{tab-item}} (?!{}$).*?^:::$"
    return {name: re.sub(others.format(name), "", text, flags=re.M | re.S) for name in names} or {"": text}


def blocks(page, language="python"):
    """The code blocks of a page in one language, by the tab's name."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return {
        tab: re.findall(rf"```{language}\n(.*?)```", variant, flags=re.S)
        for tab, variant in variants(text).items()
    }


def run(page, tab=""):
    """Runs the Python blocks of a page from top to bottom; returns the names that they define."""
    names = {}
    for number, code in enumerate(blocks(page)[tab]):
        exec(compile(code, f"{page}.md {tab}, block {number}", "exec"), names)
    return names


NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?![\w.])")
TIME = re.compile(r"about (?:[\d.]+ (?:s|min|h) )+and [\d.]+ GB|compiled in \d+ s")


def assert_printed(shown, printed, rel=0.05):
    """The lines that a page shows are printed in this order, numbers within a tolerance, estimates as they are.

    A line `...` stands for any lines.
    """
    rest = iter(printed.splitlines())
    for line in shown.splitlines():
        assert line == "..." or any(_alike(line, other, rel) for other in rest), line


def _alike(shown, printed, rel):
    words, numbers = zip(*(_parts(line) for line in (shown, printed)), strict=True)
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=rel, abs=1e-6)


def _parts(line):
    line = " ".join(TIME.sub("TIME", line).split())
    return NUMBER.sub("N", line), [float(number.replace(",", "")) for number in NUMBER.findall(line)]
