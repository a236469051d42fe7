"""What an error message must show, whatever sentence it stands in."""

import re


def mentions(*words):
    """A pattern for `match=`: every word stands somewhere in the message, in any order.

    >>> bool(re.search(mentions("rank", 0), "0 is below the least rank"))
    True
    >>> bool(re.search(mentions("rank", 0), "rank must not be 10 or 0.5"))
    False
    """
    return "(?s)^" + "".join(rf"(?=.*(?<!\w)(?<!\d\.){re.escape(str(word))}(?!\w)(?!\.\d))" for word in words)


def assert_mentions(message, *words):
    """Every word stands somewhere in the message, in any order."""
    missing = [word for word in words if not re.search(mentions(word), message)]
    assert not missing, f"{missing} in: {message}"
