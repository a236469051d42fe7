"""Conversations, chat templates, and what the loss of one is on."""

import json

from tokenizers import AddedToken

from loraplus_jax.data.chat import tokenize_chats
from loraplus_jax.data.chat_template import ChatTemplate
from loraplus_jax.data.conversations import Chat, Turn

BOS, EOS = "<|start|>", "<|end|>"
CHATML = """\
{%- for m in messages %}
    {{- '<|start|>' + m['role'] + '\\n' + m['content'] + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"""
INST = """\
{{- bos_token }}
{%- for m in messages if m.role != 'system' %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}
    {%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
MARKED = """\
{% for m in messages %}
{% if m.role == 'assistant' %}
<|start|>assistant
{% generation %}
{{ m.content }}<|end|>{% endgeneration %}

{% else %}
{{ '<|start|>' + m.role + '\\n' + m.content + '<|end|>' }}
{% endif %}
{% endfor %}"""
# Only the last answer is preceded by thoughts, as in Qwen3's.
THINKS = CHATML.replace(
    "m['content']", "('<t></t>' if loop.last and m.role == 'assistant' else '') + m.content"
)


def template(source=CHATML, **fields):
    return ChatTemplate(source, "toy.json", **{"bos_token": BOS, "eos_token": EOS} | fields)


def chat(*texts, system=None, place="f.jsonl:1"):
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Chat(((Turn("system", system),) if system else ()) + tuple(turns), place)


def specials():
    return [AddedToken(t, special=True, normalized=False) for t in (BOS, EOS)]


def learnt(chats, tokenizer, which, **options):
    """What the loss is on, as text; of one conversation."""
    sequences = tokenize_chats([chats], tokenizer, which, 4096, **options)
    ids = sequences.ids[0][sequences.masks[0] == 1]
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def write_json(path, rows):
    lines = "\n".join(json.dumps(r) for r in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, "utf-8")
    return path
