"""Chat templates: render conversations to text with the Jinja template of a model or of the user."""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .._validation import expand_path
from ..models.tokenizer import read_chat_template, special_tokens
from .conversations import Turn

MAX_CHARACTERS = 16 * 2**20
MAX_STEPS, STEPS_PER_CALL = 1_000_000, 20
"""Limits per conversation: characters written, loop iterations, and how many iterations a call counts as."""

DATE = datetime.datetime(2024, 7, 26)
"""The date that `strftime_now` formats: the fallback of Llama 3's template, so tokens do not depend on today."""

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

# Unicode noncharacters, which are not meant for text interchange, around the contents of {% generation %} blocks.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, as in transformers: marks the assistant's text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_OPEN, _CLOSE)]
        return [marks[0], *body, marks[1]]


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' Jinja environment for chat templates, with a limit on loop iterations and calls."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": DATE.strftime}
        self.steps = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise TemplateSyntaxError("recursive loops are not allowed", loop.lineno)
            loop.iter = nodes.Call(nodes.EnvironmentAttribute("count_items"), [loop.iter], [], None, None)
        return tree

    def count_items(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items of a loop and counts each as a step."""
        for item in items:
            self._step()
            yield item

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Calls as the base sandbox does, and counts the call as `STEPS_PER_CALL` steps."""
        self._step(STEPS_PER_CALL)
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Rejects powers, and products of strings or lists that would exhaust memory."""
        size = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        repeats = any(hasattr(x, "__len__") for x in (left, right))
        if operator == "**" or (repeats and size[0] * size[1] > MAX_CHARACTERS):
            reason = "is not allowed" if operator == "**" else f"makes a value longer than {MAX_CHARACTERS:,}"
            raise TemplateRuntimeError(f"the operator {operator} {reason}")
        return super().call_binop(context, operator, left, right)

    def _step(self, cost: int = 1) -> None:
        self.steps += cost
        if self.steps > MAX_STEPS:
            raise TemplateRuntimeError(
                f"more than {MAX_STEPS:,} loop iterations or {MAX_STEPS // STEPS_PER_CALL:,} calls"
            )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson` filter: unlike Jinja's, it does not escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, rendered in a sandbox that limits its loops, calls, products and output.

    Memory is not limited: a template can still exhaust it by joining or padding strings.

    As in transformers, the template sees `messages` (each with `role` and `content`), `add_generation_prompt`,
    `bos_token`, `eos_token`, `tools` and `documents` (both None), `raise_exception` and `strftime_now` (always of
    `DATE`).

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
        try:
            _ = self._compiled
        except (TemplateError, RecursionError) as error:
            line = f" in line {error.lineno}" if getattr(error, "lineno", None) else ""  # pyright: ignore
            raise ValueError(f"the chat template of {self.origin} is invalid{line}: {error}") from None

    @functools.cached_property
    def _compiled(self) -> Any:
        return _Sandbox().from_string(self.source)

    @property
    def marks_answers(self) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    def render(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool = False, place: str = "a conversation"
    ) -> str:
        """Renders a conversation to text.

        Args:
          turns: the messages.
          add_generation_prompt: append the header that precedes an answer of the assistant.
          place: location of the conversation, for error messages.

        Raises:
          ValueError: the template fails; the message names its origin and `place`.
        """
        return self.render_marked(turns, add_generation_prompt=add_generation_prompt, place=place)[0]

    def render_marked(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool = False, place: str = "a conversation"
    ) -> tuple[str, list[tuple[int, int]]]:
        """Like `render`, but also returns the character range (start, end) of each `{% generation %}` block."""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self._run(messages, add_generation_prompt)
        # A template is arbitrary code and can raise anything.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{place}: the chat template of {self.origin} fails: {reason}") from error
        return _split_marks(text)

    def _run(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if any(mark in m["content"] for m in messages for mark in (_OPEN, _CLOSE)):
            raise ValueError("the text contains U+FDD0 or U+FDD1, which are not characters: remove them")
        self._compiled.environment.steps = 0
        pieces, size = [], 0
        for piece in self._compiled.generate(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            tools=None,
            documents=None,
        ):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise ValueError(f"it writes more than {MAX_CHARACTERS:,} characters")
        return "".join(pieces)


def _split_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text without marks, and the character range between each pair of marks."""
    pieces, size, spans, start = [], 0, [], 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece == _OPEN:
            start = size
        elif piece == _CLOSE:
            spans.append((start, size))
        else:
            pieces.append(piece)
            size += len(piece)
    return "".join(pieces), spans


def load_template(choice: str, model: str | Path) -> ChatTemplate:
    """Loads a chat template: `"model"`, `"plain"`, or the path of a template file.

    Args:
      choice: `"model"` for the model's own template, `"plain"` for `PLAIN`, or a path.
      model: a Hugging Face directory or a GGUF file; every template uses its `bos_token` and `eos_token`.

    Raises:
      ValueError: the model has no template; `"plain"` has no `eos_token` to end answers with; the file cannot be
        read; or the template is invalid.
    """
    tokens = special_tokens(model)
    bos, eos = tokens.get("bos_token", ""), tokens.get("eos_token", "")
    if choice == "plain":
        if not eos:
            raise ValueError(
                f"template plain needs an eos_token, but {model} has none: use model or a template file"
            )
        return ChatTemplate(PLAIN, "plain", bos, eos)
    if choice != "model":
        try:
            source = expand_path("template", choice).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            allowed = "use model, plain or the path of a file"
            raise ValueError(
                f"cannot read the chat template {str(Path(choice))!r} ({allowed}): {error}"
            ) from None
        return ChatTemplate(source, choice, bos, eos)
    source = read_chat_template(model)
    if source is None or not source.strip():
        raise ValueError(
            f"{model} has no chat template: set data.template (for generate: --template) to plain "
            "(### Instruction, ### Response) or to the path of a template"
        )
    return ChatTemplate(source, str(model), bos, eos)
