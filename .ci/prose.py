"""Writes the prose of the pages and docstrings, without code and tables, into a directory for proselint.

python .ci/prose.py DIRECTORY && proselint check --config .ci/proselint.json DIRECTORY/*
"""

import ast
import itertools
import re
import string
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/notebooks").glob("*.md")]
# One word per piece of code: a repeated placeholder would count as a repeated word. Without digits, or "code560's"
# would count as a decade.
words = ("code" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))


def prose_of(text: str) -> str:
    """The text without code blocks, doctests and table rows, its inline code as placeholders."""
    text = re.sub(r"```.*?```|^ *(>>>|\.\.\.|\|).*$|^#+ .*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", lambda _: next(words), text)


def docstrings_of(path: Path) -> str:
    """All docstrings of a Python file."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)
    ]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


texts = {path: path.read_text(encoding="utf-8") for path in PAGES}
texts |= {path: docstrings_of(path) for path in (ROOT / "loraplus_jax").rglob("*.py")}
for path, text in texts.items():
    # A file's name says where to mend it: proselint prints it.
    name = str(path.relative_to(ROOT)).replace("/", "__")
    (Path(sys.argv[1]) / f"{name}.txt").write_text(prose_of(text), encoding="utf-8")
