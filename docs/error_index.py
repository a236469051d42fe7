"""Finds the messages of all errors that the package raises, in its source.

A message is often a variable, a list of problems, or what a helper returns. So from each `raise`, values are traced
back to the texts they are made of: through assignments, loops and appends, to what functions of the package return,
and to the arguments that callers pass.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_CALLS = 2
"""Calls between a text and its `raise`; what is further away is hardly ever a message."""
FEWEST_WORDS = 3
"""Shorter texts are names and separators, except in a `raise` itself."""
WORD = re.compile(r"(?<![^\s(])[\w.-]*[a-z]{2}[\w'.-]*(?=[,;:)\s]|\{\.\.\.\}|$)")
ADDS = ("add", "append", "extend", "insert", "setdefault")
TEXTS = ("value", "flag", "Command", "Asset", "ArgumentParser")
"""Calls whose texts are help and descriptions."""
COLLECTED = ("problems", "faults", "collector")
"""Variables of problems that are raised together, far from where they are found."""


class Index:
    """The messages of a package.

    Attributes:
      messages: maps each file to its messages in order, as (error classes, text); `{...}` in a text is a value.
    """

    def __init__(self, package: Path) -> None:
        self.places: dict[ast.AST, tuple[Path, Any]] = {}  # file, and enclosing function or file's stem
        self.functions: dict[Any, list[ast.FunctionDef]] = defaultdict(list)  # by file's stem and name
        self.calls: dict[str, list[ast.Call]] = defaultdict(list)  # by name
        self.imports: dict[Any, str] = {}  # file's stem and name: stem of the file that defines it
        self.values: dict[Any, list[ast.AST]] = defaultdict(list)  # of a variable of a function or file
        for path in sorted(package.rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            self._register(tree, path, path.stem)
        found: dict[Any, set[tuple[int, str]]] = defaultdict(set)
        sources: dict[ast.AST, list[ast.AST]] = {}
        roots = [
            (x.exc, _name(x.exc))
            for x in self.places
            if isinstance(x, ast.Raise) and isinstance(x.exc, ast.Call)
        ]
        roots += [
            (x, "ValueError")
            for (_, name), values in self.values.items()
            if name in COLLECTED
            for x in values
        ]
        roots += [(x, "ValueError") for call in self.calls["Problems"] for x in call.args]
        for root, error in roots:
            for text, calls in self._texts(root, sources):
                found[self.places[text][0], text.lineno, _format(text)].add((calls, error))
        self.messages: dict[Path, list[tuple[str, str]]] = defaultdict(list)
        for (path, _, text), raised in sorted(found.items()):
            nearest = min(raised)[0]
            self.messages[path].append((", ".join(sorted(x for n, x in raised if n == nearest)), text))

    def _register(self, node: Any, path: Path, scope: Any) -> None:
        self.places[node] = path, scope
        match node:
            case ast.Call(func=ast.Attribute(value=target, attr=name)) if name in ADDS:
                self._bind(scope, target, node.args)
            case ast.Assign():
                for target in node.targets:
                    self._bind(scope, target, [node.value])
            case ast.AugAssign() | ast.AnnAssign() | ast.NamedExpr():
                self._bind(scope, node.target, [node.value] if node.value else [])
            case ast.For() | ast.comprehension():
                self._bind(scope, node.target, [node.iter])
            case ast.ImportFrom(module=str(module)):
                self.imports |= {(path.stem, x.name): module.rpartition(".")[2] for x in node.names}
            case ast.FunctionDef():
                self.functions[path.stem, node.name].append(node)
                scope = node
        if isinstance(node, ast.Call):
            self.calls[_name(node)].append(node)
        for child in ast.iter_child_nodes(node):
            self._register(child, path, scope)

    def _bind(self, scope: Any, target: ast.AST, values: list[Any]) -> None:
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                self.values[scope, name.id] += (
                    [*values, target.slice] if isinstance(target, ast.Subscript) else values
                )

    def _texts(self, raised: ast.AST, sources: dict[ast.AST, list[ast.AST]]) -> Iterator[tuple[Any, int]]:
        """The texts that what is raised can contain, with the number of calls in between; nearest first."""
        seen: set[ast.AST] = set()
        work, nodes = [raised], list(ast.walk(raised))
        inner = {x for node in nodes if isinstance(node, ast.FormattedValue) for x in ast.walk(node)}
        for calls in range(MOST_CALLS + 1):
            further = []
            while work:
                node = work.pop()
                if node in seen:
                    continue
                seen.add(node)
                if len(WORD.findall(_format(node))) >= (
                    1 if node in nodes and node not in inner else FEWEST_WORDS
                ):
                    yield node, calls
                if node not in sources:  # many errors share helpers
                    sources[node] = list(self._sources(node))
                for source in sources[node]:
                    (work if self.places[source][1] is self.places[node][1] else further).append(source)
            work = further

    def _sources(self, node: Any) -> Iterator[ast.AST]:
        """Where the value of an expression comes from: its parts, a variable's values, a function's results."""
        match node:
            case ast.Compare():
                return
            case ast.Call() if _name(node) in TEXTS:
                return
            case ast.IfExp():
                yield from (node.body, node.orelse)
            case ast.JoinedStr():
                yield from (x for x in node.values if isinstance(x, ast.FormattedValue))
            case ast.Name():
                path, scope = self.places[node]
                file = self.imports.get((path.stem, node.id), path.stem)
                yield from self.values.get((scope, node.id)) or self.values.get((file, node.id), [])
                yield from self._arguments(scope, node.id) if isinstance(scope, ast.FunctionDef) else ()
            case ast.Call():
                yield from ast.iter_child_nodes(node)
                results = (ast.Return, ast.Yield, ast.YieldFrom)
                for function in self._functions(node):
                    yield from (x.value for x in ast.walk(function) if isinstance(x, results) and x.value)
            case _:
                yield from ast.iter_child_nodes(node)

    def _functions(self, call: ast.Call) -> list[ast.FunctionDef]:
        file, name = self.places[call][0].stem, _name(call)
        return self.functions.get((self.imports.get((file, name), file), name), [])

    def _arguments(self, function: ast.FunctionDef, name: str) -> Iterator[ast.AST]:
        """What callers pass for a parameter."""
        parameters = [x.arg for x in function.args.args if x.arg not in ("self", "cls")]
        for call in self.calls[function.name]:
            if function in self._functions(call):
                yield from (
                    x for parameter, x in zip(parameters, call.args, strict=False) if parameter == name
                )
                yield from (x.value for x in call.keywords if x.arg == name)


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _format(node: ast.AST) -> str:
    """A literal text; empty for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(str(x.value) if isinstance(x, ast.Constant) else "{...}" for x in node.values)
    return ""
