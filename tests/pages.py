"""The code of the documentation's pages, as a reader sees it."""

import re
from pathlib import Path

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
