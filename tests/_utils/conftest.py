"""How untrusted files are rejected."""

import pytest

from loraplus_jax._utils import untrusted

from ..fuzz.damage import peak_limit
from ..messages import assert_mentions


@pytest.fixture
def reject(monkeypatch, ten_seconds):
    """Checks that a call raises one line with some words, within ten seconds and with little memory."""
    monkeypatch.setattr(untrusted, "SECONDS", 1)

    def check(act, *words):
        with peak_limit(0), pytest.raises(ValueError, match=r"^[^\n]{1,500}$") as caught:
            act()
        assert type(caught.value) is ValueError
        assert_mentions(str(caught.value), *words)

    return check
