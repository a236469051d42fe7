"""One test for many calls that must raise: rows of a call and of words that its message holds."""

import inspect

import pytest

from .messages import mentions


def refusals(*rows, error=(ValueError, TypeError), lines=1):
    """Makes a test of calls that raise.

    Each row is a function, whose parameters name fixtures, and words that the message must hold. The message has at
    most so many lines.
    """
    names = [" ".join(map(str, row[1:]))[:60] for row in rows]

    @pytest.mark.parametrize("row", rows, ids=names)
    def test(row, request):
        call, *words = row
        given = {name: request.getfixturevalue(name) for name in inspect.signature(call).parameters}
        with pytest.raises(error, match=mentions(*words)) as caught:
            call(**given)
        assert len(str(caught.value).splitlines()) <= lines

    return test
