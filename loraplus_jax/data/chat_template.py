"""Chat templates: conversations to text, by the jinja program that a model brings or one that the user names."""

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

from ..models.tokenizer import read_chat_template, special_tokens
from .conversations import Turn

MAX_CHARACTERS = 16 * 2**20
MAX_STEPS, STEPS_PER_CALL = 1_000_000, 20
"""The most that a template may write for one conversation, the most loop passes, and how many a call counts for."""

DATE = datetime.datetime(2024, 7, 26)
"""What `strftime_now` tells a template: the day Llama 3's own falls back on, so that no token depends on today."""

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
"""The template `"plain"`, for models without one of their own."""

# Noncharacters, which no text in interchange holds, around what {% generation %} blocks write.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, as transformers has it: what lies inside is the assistant's."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_OPEN, _CLOSE)]
        return [marks[0], *body, marks[1]]


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which every loop and every call is counted as well."""

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
        """As in every sandbox, and counted."""
        self._step(STEPS_PER_CALL)
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """No powers and no products of texts that would fill the memory."""
        size = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        texts = any(hasattr(x, "__len__") for x in (left, right))
        if operator == "**" or (texts and size[0] * size[1] > MAX_CHARACTERS):
            raise TemplateRuntimeError(f"{operator} makes too large a value")
        return super().call_binop(context, operator, left, right)

    def _step(self, cost: int = 1) -> None:
        self.steps += cost
        if self.steps > MAX_STEPS:
            raise TemplateRuntimeError(
                f"more than {MAX_STEPS:,} loop passes, or {MAX_STEPS // STEPS_PER_CALL:,} calls"
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
    """transformers' filter: unlike jinja's it escapes nothing for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, run in a sandbox that also bounds its loops, its calls, its products and what it writes.

    Memory has no bound: a template can still join or pad texts until it is full.

    As in transformers it sees `messages` (each with `role` and `content`), `add_generation_prompt`, `bos_token`,
    `eos_token`, `tools` and `documents` (both None), `raise_exception` and `strftime_now` (of the fixed `DATE`).

    Attributes:
      source: the template.
      origin: what it is called in messages, such as the file it came from.
      bos_token, eos_token: the model's, as text; empty where it has none.

    Raises:
      ValueError: it is no valid template.

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
            raise ValueError(f"the chat template of {self.origin} is not valid{line}: {error}") from None

    @functools.cached_property
    def _compiled(self) -> Any:
        return _Sandbox().from_string(self.source)

    @property
    def marks_answers(self) -> bool:
        """Whether it has `{% generation %}` blocks."""
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    def render(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool = False, place: str = "a conversation"
    ) -> str:
        """The conversation as text.

        Args:
          turns: what was said.
          add_generation_prompt: end with what goes before an answer of the assistant.
          place: where the conversation comes from, for the message.

        Raises:
          ValueError: the template fails, which names its origin and `place`.
        """
        return self.render_marked(turns, add_generation_prompt=add_generation_prompt, place=place)[0]

    def render_marked(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool = False, place: str = "a conversation"
    ) -> tuple[str, list[tuple[int, int]]]:
        """As `render`, and the first and last-plus-one character of what each `{% generation %}` block wrote."""
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
            raise ValueError("the text holds U+FDD0 or U+FDD1, which are no characters")
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
                raise ValueError(f"more than {MAX_CHARACTERS:,} characters")
        return "".join(pieces)


def _split_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the character range between each pair of them."""
    kept, size, spans, start = [], 0, [], 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece == _OPEN:
            start = size
        elif piece == _CLOSE:
            spans.append((start, size))
        else:
            kept.append(piece)
            size += len(piece)
    return "".join(kept), spans


def load_template(choice: str, model: str | Path) -> ChatTemplate:
    """Loads the chat template that a setting names: `"model"`, `"plain"`, or the path of a template file.

    Args:
      choice: the setting's value: `"model"` is the model's own template, `"plain"` is `PLAIN`.
      model: a Hugging Face directory or a GGUF file; every template uses its `bos_token` and `eos_token`.

    Raises:
      ValueError: the model has no template, or for `plain` no `eos_token` to end answers with; a file cannot be
        read; or the template is not valid.
    """
    tokens = special_tokens(model)
    bos, eos = tokens.get("bos_token", ""), tokens.get("eos_token", "")
    if choice == "plain":
        if not eos:
            raise ValueError(f"the template plain ends answers with the eos_token, and {model} names none")
        return ChatTemplate(PLAIN, "plain", bos, eos)
    if choice != "model":
        try:
            source = Path(choice).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            known = "it is model, plain or the path of a file"
            raise ValueError(
                f"cannot read the chat template {str(Path(choice))!r} ({known}): {error}"
            ) from None
        return ChatTemplate(source, choice, bos, eos)
    source = read_chat_template(model)
    if source is None or not source.strip():
        raise ValueError(
            f"{model} has no chat template: choose plain (### Instruction, ### Response) or the path of a "
            "template, with data.template or, for generate, --template"
        )
    return ChatTemplate(source, str(model), bos, eos)
