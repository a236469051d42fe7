"""Conversations, chat templates, and what the loss of one is on."""

import json

from tokenizers import AddedToken

from loraplus_jax.data.chat_template import ChatTemplate
from loraplus_jax.data.chat_tokens import tokenize_chats
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
# Tools, calls, and results, as a template of Qwen's kind has them.
TOOLS = """\
{%- if tools %}{{ '<|start|>tools\\n' + (tools | tojson) + '<|end|>\\n' }}{% endif %}
{%- for m in messages %}
    {{- '<|start|>' + m.role + '\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n' + call.function.name + ' ' + (call.function.arguments | tojson) }}
    {%- endfor %}
    {{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"""
# Only the last answer is preceded by thoughts, as in Qwen3's.
THINKS = CHATML.replace(
    "m['content']", "('<t></t>' if loop.last and m.role == 'assistant' else '') + m.content"
)


def template(source=CHATML, **fields):
    return ChatTemplate(source, **{"origin": "toy.json", "bos_token": BOS, "eos_token": EOS} | fields)


def chat(*texts, system=None, place="f.jsonl:1"):
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return Chat(((Turn("system", system),) if system else ()) + tuple(turns), place)


def call(name, arguments, **fields):
    return fields | {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL_TALK = {
    "messages": [
        {"role": "user", "content": "Add 1 and 2."},
        {"role": "assistant", "content": None, "tool_calls": [call("add", '{"a": 1, "b": "two"}', id="x")]},
        {"role": "tool", "tool_call_id": "x", "name": "add", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "See.", "tool_calls": [call("add", {}), call("sub", {"c": [4]})]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "It is 3."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
}
"""A conversation with tools as OpenAI, TRL and axolotl have it, as a row of a file."""


def specials():
    return [AddedToken(t, special=True, normalized=False) for t in (BOS, EOS)]


def learnt(chats, tokenizer, which, **options):
    """What the loss is on, as text; of one conversation."""
    columns, _ = tokenize_chats([chats], tokenizer, which, 4096, **options)
    ids = columns["input_ids"][0][columns["loss_mask"][0] == 1]
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def write_json(path, rows):
    lines = "\n".join(json.dumps(r) for r in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, "utf-8")
    return path
