"""The tokens that end an answer."""

import pytest
from tokenizers import AddedToken, Tokenizer, models

from loraplus_jax.data.chat_template import ChatTemplate
from loraplus_jax.data.chat_tokens import end_of_turn

END = "<|end|>"
HEAD = "{% for m in messages %}{% if m.role == 'user' %}|{{ m.content }}|" + END + "{% else %}a|"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE(unk_token="?", vocab={"?": 0, "\n": 1, "|": 2}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


MARKED, ASKED = "{% generation %}", "{% if add_generation_prompt %}a|{% endif %}"
END_MARK = "{% endgeneration %}"


@pytest.mark.parametrize(
    ("answer", "taught"),
    [
        ("{{ m.content }}<|end|>\n", True),
        (MARKED + "{{ m.content }}<|end|>" + END_MARK, True),
        (MARKED + "{{ m.content }}<|end|>\n" + END_MARK, True),
        (MARKED + "{{ m.content }}" + END_MARK + "<|end|>", False),
        (MARKED + "{{ m.content }}\n" + END_MARK + "\n<|end|>\n", False),
        ("{{ m.content }}\n", None),  # no token follows the answer
        (MARKED + "{{ m.content }}\n" + END_MARK, None),
    ],
)
def test_an_answer_ends_with_the_special_token_after_its_text(tokenizer, answer, taught):
    source = HEAD + answer + "{% endif %}{% endfor %}" + ASKED
    expected = None if taught is None else (tokenizer.token_to_id(END), taught)
    assert end_of_turn(tokenizer, ChatTemplate(source, "t")) == expected


def test_a_template_that_hides_where_answers_are_has_no_end_of_turn(tokenizer):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}" + ASKED.replace("a|", "<think>")
    assert end_of_turn(tokenizer, ChatTemplate(source, "t")) is None
