"""Finds pairs of LoRA factors in the parameter tree of any library, and which factor is A and which is B."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from .._utils.validation import suggest
from ..adapter.spec import AdapterSpec, Specs

Side = Literal["a", "b"]

_SUFFIX = r"(?:/(?:kernel|weight|w))?(?:/value)?"
_FORMS = (
    r"(?:(?P<module>.*)/)?lora_(?P<side>[ab])",  # ours, nnx.LoRA, torchtune
    r"(?P<module>(?:.*/)?[^/]+)_lora_(?P<side>[ab])",  # qwix
    r"(?:(?P<module>.*)/)?lora_[a-z]+_(?P<side>[ab])",  # our embeddings, keras
    r"(?P<module>(?:.*/)?lora)/(?P<side>[ab])",  # gemma
    # PEFT, optionally followed by the adapter's name; kohya and diffusers.
    r"(?:(?P<module>.*)/)?lora_(?:embedding_)?(?P<side>[AB])(?:/(?!bias$|weight|kernel|value)(?P<adapter>[^/]+))?",
    r"(?:(?P<module>.*)/)?lora_(?P<side>down|up)",
)
"""Names of factors that determine the side. Dots count as slashes; `_SUFFIX`, a layer or container that holds the
factor, may follow."""

_SIDES: Mapping[str, Side] = {"a": "a", "A": "a", "down": "a", "b": "b", "B": "b", "up": "b"}
_KNOWN_NAMES = (
    "lora_a and lora_b, kernel_lora_a, lora_kernel_a, lora/a, lora_A and lora_B (PEFT), lora_down and lora_up"
)
_LOOKS_LIKE_LORA = re.compile(r"(?<![A-Za-z])(?i:lora)(?![a-z])|(?<=[a-z])Lo[rR][aA](?![a-z])")
_NOT_FACTOR = re.compile(r"(?:^|/)lora_scale(?:/|$)|magnitude")


class Pair(NamedTuple):
    """The paths of an adapter's factors.

    Attributes:
      a: path of the factor on the input side, str.
      b: path of the factor on the output side, str.
    """

    a: str
    b: str


def is_embedding_factor(path: str) -> bool:
    """Whether a path is that of an embedding's factor by its name: ours, PEFT's or keras's."""
    return re.search(r"(?:^|[./])lora_embeddings?_[abAB]\b", path) is not None


def is_magnitude(path: str) -> bool:
    """Whether a path is that of DoRA's magnitudes by its name: ours or PEFT's."""
    return re.search(r"(?:^|[/._])lora_magnitude(?:_vector)?(?:[/.]|$)", path) is not None


def factor_pairs(leaves: Mapping[str, Any], specs: Specs | None = None) -> dict[str, Pair]:
    """Finds the pairs of factors in a tree, passed as path to leaf.

    The name of a factor determines its side. Raises ValueError as `label_params`.

    Returns:
      The `Pair` of each module, by the module's path in the tree, such as `"lora/query"`; empty if there is none.
    """
    pairs, by_name = {}, _pairs_by_name(leaves)
    paths = spec_paths(by_name, specs)
    for module, sides in by_name.items():
        # PyTorch's names; its Linear is (out, in).
        torch = any(re.search(r"lora_(embedding_)?([AB]|down|up)\b|[./]weight$", p) for p in sides.values())
        spec = (specs or {}).get(paths[module])
        if specs is not None and spec is None:
            raise ValueError(f"{module or 'the tree'} is not in the specs{suggest(module, specs)}")
        _check_pair(module, {side: leaves[path] for side, path in sides.items()}, spec, may_be_torch=torch)
        pairs[module] = Pair(sides["a"], sides["b"])
        if specs is None:
            _check_kernel(module, leaves, pairs[module])
    ours = any(pair.a.startswith("lora/") for pair in pairs.values())
    # Outside our own collection there are fully trained weights, which may have any name.
    leaves = {path: leaf for path, leaf in leaves.items() if not ours or path.startswith("lora/")}
    _check_unnamed({path: leaf for path, leaf in leaves.items() if path.rpartition("/")[0] not in pairs})
    _check_names(leaves, pairs, ours)
    return pairs


def _pairs_by_name(leaves: Iterable[str]) -> dict[str, dict[Side, str]]:
    """Maps each module to the paths of its factors by side, for names that determine the side."""
    pairs: dict[str, dict[Side, str]] = {}
    for path in leaves:
        name = path.replace(".", "/")
        match = next((m for form in _FORMS if (m := re.fullmatch(form + _SUFFIX, name))), None)
        if match is None:
            continue
        parts = match.groupdict()
        module = "/".join(filter(None, (parts["module"], parts.get("adapter"))))
        sides, side = pairs.setdefault(module, {}), _SIDES[parts["side"]]
        if side in sides:
            raise ValueError(f"{sides[side]} and {path} are both factor {side} of {module or 'the tree'}")
        sides[side] = path
    return pairs


def _check_unnamed(leaves: Mapping[str, Any]) -> None:
    """Rejects factors called `a` and `b`, or `A` and `B`, as lorax's, whose names say no side."""
    for path in leaves:
        module, _, name = path.rpartition("/")
        other = f"{module}/{chr(ord(name) + 1)}".lstrip("/") if name in ("a", "A") else ""
        shapes: list[tuple[int, ...]] = [getattr(leaves.get(p), "shape", ()) for p in (path, other)]
        for first, second in (shapes, shapes[::-1]):
            # With a rank below both sizes; otherwise they may be any two arrays.
            if min(map(len, shapes)) > 1 and second[-2] == first[-1] < min(first[-2], second[-1]):
                raise ValueError(
                    f"{module or 'the tree'}: {path} {shapes[0]} and {other} {shapes[1]} may be LoRA factors, "
                    f"but their names do not say which is the input side; supported names: {_KNOWN_NAMES}"
                )


def _check_kernel(module: str, leaves: Mapping[str, Any], pair: Pair) -> None:
    """Rejects factors whose names contradict the kernel next to them about the sides."""
    above = module.removesuffix("lora").rstrip("/") if module.rpartition("/")[2] == "lora" else module
    names = (above, *(f"{above}/{leaf}".removeprefix("/") for leaf in ("kernel", "embedding")))
    a, b = (tuple(leaves[path].shape) for path in pair)
    for name in (*names, *(f"{name}/value" for name in names)):
        kernel = tuple(getattr(leaves.get(name), "shape", ()))
        if len(kernel) != len(a) or len(a) != len(b) or len(a) < 2:
            continue
        swapped = (b[-1], a[-2]) == kernel[-2:] and a[-2] != b[-1]
        if swapped and a[:-2] == b[:-2] == kernel[:-2]:
            raise ValueError(
                f"{module or 'the tree'}: {pair.a} {a} is the input side by its name, but the kernel "
                f"{kernel} needs {pair.b} {b} there; rename the factors by side"
            )


def _check_names(leaves: Mapping[str, Any], pairs: Mapping[str, Pair], ours: bool) -> None:
    """Rejects a leaf that looks like a LoRA factor but would be trained like any other weight."""
    factors = {path for pair in pairs.values() for path in pair}
    for path, leaf in leaves.items():
        if path in factors or len(getattr(leaf, "shape", ())) < 2 or _NOT_FACTOR.search(path):
            continue
        segments = path.split("/")
        above = ["/".join(segments[: n + 1]) for n in range(len(segments))]
        lora_like = [
            p for p, segment in zip(above, segments, strict=True) if _LOOKS_LIKE_LORA.search(segment)
        ]
        unpaired = any(not any(f"{factor}/".startswith(f"{p}/") for factor in factors) for p in lora_like)
        if unpaired or (ours and not set(above) & pairs.keys()):
            raise ValueError(
                f"{path} {tuple(leaf.shape)} looks like a LoRA factor, but its name does not say whether it "
                f"is A or B; supported names: {_KNOWN_NAMES}; if it is not a factor, rename it"
            )


def _check_pair(
    module: str, pair: Mapping[Side, Any], spec: AdapterSpec | None, *, may_be_torch: bool
) -> None:
    where = module or "the tree"
    sides: tuple[Side, Side] = ("a", "b")
    if missing := [side for side in sides if side not in pair]:
        raise ValueError(f"{where} has only one factor: lora_{missing[0]} is missing")
    a, b = (tuple(pair[side].shape) for side in sides)
    if spec is not None and (a, b) != spec.factor_shapes[:2]:
        raise ValueError(f"{where}: factors must have shapes {spec.factor_shapes[:2]}, got {a} and {b}")
    if min(len(a), len(b)) < 2 or not (a[-1] in b[:-1] or (may_be_torch and a[0] == b[1])):
        raise ValueError(
            f"{where}: lora_a and lora_b must be (in, r) and (r, out)"
            + (", or (r, in) and (out, r)" if may_be_torch else "")
            + f", got {a} and {b}"
        )


def spec_paths(modules: Iterable[str], specs: Specs | None) -> dict[str, str]:
    """The paths in the specs of modules with factors in a tree: without the collection's name, if it has one."""
    modules = list(modules)
    # A module may be called "lora" too: without the collection the specs have all paths as they are.
    is_bare = all(module in (specs or {}) for module in modules)
    return {path: path if is_bare else f"{path}/".removeprefix("lora/").rstrip("/") for path in modules}
