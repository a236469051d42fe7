"""The tokens that end an answer."""

from tokenizers import Tokenizer, models

from loraplus_jax.data.chat_template import ChatTemplate
from loraplus_jax.tasks.chat_generation import end_of_turn_ids


def test_a_template_that_hides_the_end_of_answers_has_no_end_of_turn():
    source = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert end_of_turn_ids(tokenizer, ChatTemplate(source, "t")) == ()
