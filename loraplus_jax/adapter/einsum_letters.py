"""Einsum letters of a weight: those of its factors, of an equation, and of stacked axes."""

import string

LETTERS = "abcdefghijklmnopqstuvwxyz"  # without r, which stands for the rank


def factor_letters(axes: str, stacked: tuple[int, ...] = ()) -> tuple[str, str]:
    """The einsum letters of A and B for a weight's `axes` and `stacked` in `AdapterSpec`; `r` is the rank.

    >>> factor_letters("io"), factor_letters("eio"), factor_letters("io", stacked=(1,))
    (('ar', 'rb'), ('abr', 'arc'), ('aAr', 'rAb'))
    """
    roles = list(zip(LETTERS, axes, strict=False))
    a = "".join(c for c, role in roles if role != "o") + "r"
    batch = "".join(c for c, role in roles if role not in "io")
    b = batch + "r" + "".join(c for c, role in roles if role == "o")
    return with_stacked(a, stacked), with_stacked(b, stacked)


def split_equation(equation: str) -> tuple[str, tuple[str, str]]:
    """Finds the roles of the axes of an einsum's second operand, and the two einsums of its low-rank term.

    An axis of the weight that is in the result is a batch axis, kept in both factors, if the input has it, and an
    output axis otherwise. All other axes are contracted (input axes).

    Returns:
      The roles of the weight's axes, as `axes` in `AdapterSpec`, and two equations, the first for the input and A,
      the second for their product and B.

    Raises:
      ValueError: there is no contracted axis or no output axis, or an operand has a letter twice.

    >>> split_equation("BTD,NDH->BTNH")
    ('oio', ('BTD,Dr->BTr', 'BTr,rNH->BTNH'))
    >>> split_equation("ebi,eio->ebo")
    ('eio', ('ebi,eir->ebr', 'ebr,ero->ebo'))
    """
    operands, result = equation.split("->")
    x, w = operands.split(",")
    if any(len(set(part)) < len(part) for part in (x, w, result)):
        raise ValueError(f"einsum {equation!r} cannot be adapted: an operand has a letter twice")
    outputs = "".join(c for c in w if c in result and c not in x)
    batch = "".join(c for c in w if c in result and c in x)
    if not any(c in x and c not in result for c in w):
        raise ValueError(f"einsum {equation!r} cannot be adapted: A needs a contracted axis")
    if not outputs:
        raise ValueError(f"einsum {equation!r} cannot be adapted: B needs an output axis of its own")
    rank = next(c for c in "r" + string.ascii_letters if c not in equation)
    middle = "".join(c for c in result if c not in outputs) + rank
    a = "".join(c for c in w if c not in outputs) + rank
    first, second = f"{x},{a}->{middle}", f"{middle},{batch}{rank}{outputs}->{result}"
    # A letter for each batch axis.
    spare = iter(c for c in string.ascii_lowercase[4:] + "abcd" if c not in "io")
    roles = "".join("o" if c in outputs else next(spare) if c in batch else "i" for c in w)
    return roles, (first, second)


def layer_axis(letters: str, stacked: tuple[int, ...]) -> int:
    """The index of the outermost stacked axis among einsum letters."""
    return letters.index(chr(ord("A") + len(stacked) - 1))


def with_stacked(letters: str, stacked: tuple[int, ...]) -> str:
    """The letters with a capital inserted for each axis that `nn.scan` or `nn.vmap` stacked, innermost first."""
    result = list(letters)
    for n, axis in enumerate(stacked):
        result.insert(axis if axis >= 0 else len(result) + 1 + axis, chr(ord("A") + n))
    return "".join(result)
