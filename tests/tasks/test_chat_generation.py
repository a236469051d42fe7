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


@pytest.mark.parametrize(
    ("answer", "taught"),
    [
        ("{{ m.content }}<|end|>\n", True),
        ("{% generation %}{{ m.content }}<|end|>{% endgeneration %}", True),
        ("{% generation %}{{ m.content }}<|end|>\n{% endgeneration %}", True),
        ("{% generation %}{{ m.content }}{% endgeneration %}<|end|>", False),
        ("{% generation %}{{ m.content }}\n{% endgeneration %}\n<|end|>\n", False),
    ],
)
def test_an_answer_ends_with_the_special_token_after_its_text(tokenizer, answer, taught):
    source = HEAD + answer + "{% endif %}{% endfor %}{% if add_generation_prompt %}a|{% endif %}"
    assert end_of_turn(tokenizer, ChatTemplate(source, "t")) == (tokenizer.token_to_id(END), taught)


@pytest.mark.parametrize(
    "answer", ["{{ m.content }}\n", "{% generation %}{{ m.content }}\n{% endgeneration %}"]
)
def test_a_template_without_a_token_after_answers_has_no_end_of_turn(tokenizer, answer):
    source = HEAD + answer + "{% endif %}{% endfor %}{% if add_generation_prompt %}a|{% endif %}"
    assert end_of_turn(tokenizer, ChatTemplate(source, "t")) is None


def test_a_template_that_hides_where_answers_are_has_no_end_of_turn(tokenizer):
    source = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    assert end_of_turn(tokenizer, ChatTemplate(source, "t")) is None
