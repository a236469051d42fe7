"""Chat templates: render conversations to text with the Jinja template of a model or of the user."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from .._utils.json_files import read_text
from .._utils.untrusted import run_job
from .._utils.untrusted_child import MARKS
from .._utils.validation import expand_path
from ..models.checkpoints.model_files import ModelFiles
from .conversations import Turn

PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}
        {{- '### Instruction:\n' + message.content + '\n\n' }}
    {%- else %}
        {{- '### Response:\n' + message.content + eos_token }}
        {%- if not loop.last %}{{ '\n\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}
"""
"""The template `"plain"`, for models without a chat template."""

COMPLETION = """\
{%- if bos_token != eos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}
        {{- message.content + eos_token }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
"""The template `"completion"`: input, end token, space, answer, end token; as the code of LoRA's paper has it for
GPT-2 (arXiv 2106.09685)."""

BUILT_IN = {"plain": PLAIN, "completion": COMPLETION}

Rendering = tuple[str, list[tuple[int, int]]]
"""A text, and the character range (start, end) of each `{% generation %}` block in it."""
ChatCalls = tuple[Sequence[tuple[Sequence[Turn], bool]], str, str]
CHATS_PER_REQUEST = 64


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, rendered in a sandbox in a child process of bounded time and memory; see `untrusted`.

    As in transformers, the template sees `messages` (each with `role` and `content`, and `tool_calls` if any),
    `add_generation_prompt`, `bos_token`, `eos_token`, `tools` (None if there are none), `documents` (None),
    `raise_exception` and `strftime_now` (always of 26 July 2024).

    Attributes:
      source: text of the template.
      origin: its name in messages, such as its file.
      bos_token, eos_token: the model's special tokens, as text; empty if it has none.

    Raises:
      ValueError: the template is invalid.

    >>> template = ChatTemplate(PLAIN, "plain", eos_token="</s>")
    >>> template.render([Turn("user", "Hi!")], add_generation_prompt=True)
    '### Instruction:\\nHi!\\n\\n### Response:\\n'
    """

    source: str
    origin: str
    bos_token: str = ""
    eos_token: str = ""

    def __post_init__(self) -> None:
        run_job(f"the chat template of {self.origin} is invalid", "render", source=self.source)

    @property
    def marks_answers(self) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    def render(
        self,
        turns: Sequence[Turn],
        *,
        add_generation_prompt: bool = False,
        tools: str = "",
        place: str = "a conversation",
    ) -> str:
        """Renders a conversation to text.

        Args:
          turns: the messages.
          add_generation_prompt: append the header that precedes an answer of the assistant.
          tools: JSON list of tools, or empty.
          place: location of the conversation, for error messages.

        Raises:
          ValueError: the template fails; the message names its origin and `place`.
        """
        (((text, _),),) = self.render_chats([([(turns, add_generation_prompt)], tools, place)])
        return text

    def render_chats(self, chats: Sequence[ChatCalls]) -> list[list[Rendering]]:
        """Like `render`, for conversations, each several times.

        Args:
          chats: of each conversation, pairs of the first two arguments of `render`, and the other two.
        """
        renderings: list[list[Rendering]] = []
        # Many in one request, as each takes a round trip to the child process, with the template's text.
        for start in range(0, len(chats), CHATS_PER_REQUEST):
            batch = chats[start : start + CHATS_PER_REQUEST]
            try:
                renderings += self._request(batch)
            except ValueError:
                # One that fails is named, and several that exceed a limit together need not do so alone.
                renderings += [rendering for chat in batch for rendering in self._request([chat])]
        return renderings

    def _request(self, chats: Sequence[ChatCalls]) -> list[list[Rendering]]:
        variables, what = [], ""
        for calls, tools, place in chats:
            what = f"{place}: the chat template of {self.origin} fails"
            texts = [
                tools,
                *(text for turns, _ in calls for turn in turns for text in (turn.text, turn.extra)),
            ]
            if any(mark in text for text in texts for mark in MARKS):
                raise ValueError(
                    f"{what}: the text has U+FDD0 or U+FDD1, which are not characters: remove them"
                )
            shared = {"bos_token": self.bos_token, "eos_token": self.eos_token, "documents": None}
            shared |= {"tools": json.loads(tools) if tools else None}
            for turns, add_generation_prompt in calls:
                messages = {"messages": [turn.message for turn in turns]}
                variables.append(messages | shared | {"add_generation_prompt": add_generation_prompt})
        texts = map(_split_marks, run_job(what, "render", source=self.source, calls=variables))
        return [[next(texts) for _ in calls] for calls, _, _ in chats]


def _split_marks(text: str) -> Rendering:
    pieces, size, spans, start = [], 0, [], 0
    for piece in re.split(f"([{''.join(MARKS)}])", text):
        if piece == MARKS[0]:
            start = size
        elif piece == MARKS[1]:
            spans.append((start, size))
        else:
            pieces.append(piece)
            size += len(piece)
    return "".join(pieces), spans


def load_template(choice: str, files: ModelFiles, source: str | None = None) -> ChatTemplate:
    """Loads a chat template: `"model"`, `"plain"`, `"completion"`, or the path of a template file.

    Args:
      choice: `"model"` for the model's own template, a name in `BUILT_IN`, or a path.
      files: the model's files; every template uses its `bos_token` and `eos_token`.
      source: text of the template file `choice`, if it is known; the file is then not opened.

    Raises:
      ValueError: the model has no template; a built-in one has no `eos_token` to end answers with; the file cannot
        be read; or the template is invalid.
    """
    tokens = files.special_tokens
    bos, eos = tokens.get("bos_token", ""), tokens.get("eos_token", "")
    if source is not None:
        return ChatTemplate(source, choice, bos, eos)
    if choice in BUILT_IN:
        if not eos:
            raise ValueError(
                f"template {choice} needs an eos_token, but {files} has none: use model or a template file"
            )
        return ChatTemplate(BUILT_IN[choice], choice, bos, eos)
    if choice != "model":
        try:
            source = read_text(expand_path("template", choice), "utf-8-sig", links="any")
        except ValueError as error:
            allowed = f"use model, {', '.join(BUILT_IN)} or the path of a file"
            raise ValueError(
                f"cannot read the chat template {str(Path(choice))!r} ({allowed}): {error}"
            ) from None
        return ChatTemplate(source, choice, bos, eos)
    source = files.chat_template
    if source is None or not source.strip():
        raise ValueError(
            f"{files} has no chat template: set data.template (for generate: --template) to plain "
            "(### Instruction, ### Response), completion (input and answer) or to the path of a template"
        )
    return ChatTemplate(source, str(files), bos, eos)
