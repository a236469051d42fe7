"""Chat templates: what they see, what they may not do, and where they come from."""

import json

import pytest
from tokenizers import Tokenizer, models

from loraplus_jax._utils.untrusted_child import DATE
from loraplus_jax.data.chat_template import load_template
from loraplus_jax.data.chat_tokens import tokenize_chats
from loraplus_jax.data.conversations import Turn
from loraplus_jax.models.files import open_files

from ..messages import mentions
from ..refusals import refusals
from .chats import BOS, EOS, chat, template


def test_a_template_sees_what_transformers_gives_it():
    source = """\
{% if tools is none and documents is none %}
    {{ bos_token }}
{%- endif %}
    {% for m in messages %}
  {% if m.role == 'system' %}{% continue %}{% endif %}
{{ m.content | tojson }}{{ strftime_now('%d %b %Y') }}{{ loop.length }}{{ loop.last }}
    {% endfor %}"""
    # What jinja2 3.1 gives with trim_blocks and lstrip_blocks.
    expected = f'    {BOS}"<\u00e9>"26 Jul 20242False\n"b"26 Jul 20242True\n'
    turns = [Turn("user", "<\u00e9>"), Turn("assistant", "b")]
    assert template(source).render(turns) == expected
    assert DATE.year == 2024


def rendering(source):
    chats = [chat("a", "b", place="f.jsonl:7")]
    return lambda: tokenize_chats(chats, Tokenizer(models.BPE()), template(source), 8)


test_templates_that_fail = refusals(
    (rendering("{{ raise_exception('no tools') }}"), "f.jsonl:7", "toy.json", "no tools"),
    (rendering("{{ messages[0].missing.more }}"), "f.jsonl:7", "toy.json", "'missing'"),
    (rendering("{{ messages[9].role }}"), "f.jsonl:7", "toy.json", "element 9"),
    (rendering("{{ ''.__class__.__mro__ }}"), "f.jsonl:7", "toy.json", "unsafe"),
    (rendering("{{ messages.append(1) }}"), "f.jsonl:7", "toy.json", "unsafe"),
    (rendering("{{ 1 / 0 }}"), "f.jsonl:7", "toy.json", "division by zero"),
    (rendering("{{ 1 + 'a' }}"), "f.jsonl:7", "toy.json", "unsupported operand"),
    (rendering("{% for x in 3 %}{% endfor %}"), "f.jsonl:7", "toy.json", "not iterable"),
    (lambda: template("a\n{% if %}"), "toy.json", "line 2"),
    (lambda: template("{% generation %}"), "toy.json", "line 1"),
    (lambda: template("{{ x | nope }}"), "toy.json", "'nope'"),
    (lambda: template("{{ " + "(" * 20_000), "toy.json"),
)


def test_a_template_is_chosen_by_name(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOS}}))
    with pytest.raises(ValueError, match=mentions(tmp_path, "plain", "data.template")):
        load_template("model", open_files(tmp_path))
    plain = load_template("plain", open_files(tmp_path))
    text = plain.render(chat("Add.", "3", "And?", "4", system="Be kind.").turns)
    blocks = ["Be kind.", "### Instruction:\nAdd.", f"### Response:\n3{EOS}", "### Instruction:\nAnd?"]
    assert text == "\n\n".join([*blocks, f"### Response:\n4{EOS}"])
    (tmp_path / "own.jinja").write_text("\ufeff{{ eos_token }}!", "utf-8")
    assert load_template(str(tmp_path / "own.jinja"), open_files(tmp_path)).render([]) == f"{EOS}!"
    with pytest.raises(ValueError, match=mentions("'pain'", "model", "plain")):
        load_template("pain", open_files(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    assert load_template("model", open_files(tmp_path)).render([Turn("user", "hi")]) == "hi"
    with pytest.raises(ValueError, match=mentions("plain", "eos_token")):
        load_template("plain", open_files(tmp_path))
