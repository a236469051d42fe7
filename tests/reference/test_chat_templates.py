"""Rendered conversations and their answers against transformers: tools, calls, results and text in parts."""

import json

import numpy as np
import pytest
import transformers

from loraplus_jax.data.chat_tokens import tokenize_chats
from loraplus_jax.data.conversations import read_chats

from ..data.chats import BOS, EOS, MARKED, TOOL_TALK, TOOLS, template, write_json
from ..data.conftest import tokenizer  # noqa: F401

pytestmark = pytest.mark.slow

# The answers, in blocks from the header to the end of the turn.
BLOCKS = TOOLS.replace(
    "{{- '<|start|>' + m.role + '\\n' + m.content }}",
    "{{- '<|start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{- m.content or '' }}",
).replace(
    "    {{- '<|end|>\\n' }}",
    "    {{- '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\\n' }}",
)


@pytest.mark.parametrize("source", [BLOCKS, MARKED], ids=["tools", "text"])
def test_text_and_answers_are_those_of_transformers(tmp_path, tokenizer, source):  # noqa: F811
    row = json.loads(json.dumps(TOOL_TALK))
    if source is MARKED:
        row = {"messages": [row["messages"][0], row["messages"][-1]], "tools": None}
    (chat,) = read_chats(write_json(tmp_path / "a.jsonl", [row]))
    for message in row[
        "messages"
    ]:  # transformers' templates take neither arguments as JSON nor text in parts
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            call["function"]["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    options = {"tools": row["tools"], "chat_template": source}
    text = theirs.apply_chat_template(row["messages"], tokenize=False, **options)
    assert template(source).render(chat.turns, tools=chat.tools) == text
    found = theirs.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True, **options
    )
    columns, _ = tokenize_chats([chat], tokenizer, template(source), 999)
    np.testing.assert_array_equal(columns["input_ids"][0], found["input_ids"])
    np.testing.assert_array_equal(columns["loss_mask"][0], found["assistant_masks"])
