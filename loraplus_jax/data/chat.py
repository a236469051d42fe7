"""Conversations to tokens, and which of them are answers: the loss is on what the assistant says, not elsewhere."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from .._validation import check_whole
from .chat_template import ChatTemplate
from .conversations import Chat
from .packing import Arrays, Sequences, pad

Answers = Literal["all", "last"]
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Span:
    """Where one answer lies in a rendered conversation, in characters.

    Attributes:
      start: where it begins; all that the template writes after the generation prompt belongs to it.
      text: where the assistant's own text begins.
      text_end: where that ends.
      end: where the next turn begins, or a `{% generation %}` block ends.
      marked: whether it is such a block.
    """

    start: int
    text: int
    text_end: int
    end: int
    marked: bool = False


def encode_chat(
    chats: Sequence[Chat],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    *,
    answers: Answers = "all",
) -> tuple[Arrays, int]:
    """Conversations as arrays, one a row; `tokenize_chats` and `pad` in one, and how many were truncated."""
    sequences = tokenize_chats(chats, tokenizer, template, max_length, answers=answers)
    return pad(sequences, max_length), sequences.truncated


def tokenize_chats(
    chats: Sequence[Chat],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    *,
    answers: Answers = "all",
) -> Sequences:
    """The tokens of each conversation, and which of them the model is to learn to predict.

    These are the tokens of the assistant's texts and, after each, what the template writes up to and including
    the first special token, the end of the turn. A token that holds the end of the prompt and the beginning of an
    answer is the answer's. Where the template has `{% generation %}` blocks, the answers are what these write.

    A conversation is tokenised once, as a whole, without the special tokens that the tokenizer adds to a plain
    text: a template writes them itself. Text that reads like a special token becomes one.

    Args:
      chats: N conversations.
      tokenizer: the model's; its padding and truncation are not used and stay as they are.
      template: the chat template.
      max_length: a conversation's tokens beyond it are cut off, and counted in `truncated`.
      answers: all turns of the assistant, or only the last.

    Raises:
      ValueError: the template fails, does not write the answers as they stand, or does not say where they begin and
        end; or conversations have no answer token within `max_length`.
    """
    check_whole("max_length", max_length, at_least=2)
    if answers not in ("all", "last"):
        raise ValueError(f"answers must be all or last, got {answers!r}")
    special, bos = special_ids(tokenizer, template), tokenizer.token_to_id(template.bos_token or "\0")
    ids, masks, prompts = [], [], []
    for chat, encoding, spans in _encoded(chats, tokenizer, template, answers):
        tokens = Tokens(encoding)
        mask = np.zeros(len(tokens.ids), np.float32)
        for span in spans:
            first = tokens.first_after(span.start)
            mask[first : _stop(tokens, span, special, bos, chat, template)] = 1
        mask[:1] = 0
        prompts.append(int(mask.argmax()) if mask.any() else len(mask))
        ids.append(tokens.ids)
        masks.append(mask)
    _check_answers(chats, prompts, max_length)
    truncated = sum(len(x) > max_length for x in ids)
    return Sequences(tuple(x[:max_length] for x in ids), tuple(x[:max_length] for x in masks), truncated)


def find_answers(template: ChatTemplate, chat: Chat, answers: Answers = "all") -> tuple[str, list[Span]]:
    """The rendered conversation, and where in it the assistant's answers lie; a text is one answer.

    An answer begins where the rendering of the turns before it, with the generation prompt, ends.

    Raises:
      ValueError: that rendering is not how the whole begins, or the answer's text does not follow it.
    """
    if chat.turns[0].role == "text":
        text = chat.turns[0].text
        return text, [Span(0, 0, len(text), len(text), marked=True)]
    whole, marked = template.render_marked(chat.turns, place=chat.place)
    said = [i for i, turn in enumerate(chat.turns) if turn.role == "assistant"]
    if template.marks_answers:
        found = [
            _inside(whole, start, end, chat.turns[said[-1]].text) for start, end in marked if end > start
        ]
        if not found:
            raise ValueError(f"{chat.place}: the generation blocks of {template.origin} write nothing")
        return whole, found[-1:] if answers == "last" else found
    said = said[-1:] if answers == "last" else said
    starts = [_start(template, chat, i, whole) for i in said]
    ends = [
        _end(template, chat, i, whole, then) for i, then in zip(said, [*starts[1:], len(whole)], strict=True)
    ]
    return whole, [
        _located(template, chat, turn, whole, start, end)
        for turn, start, end in zip(said, starts, ends, strict=True)
    ]


def _start(template: ChatTemplate, chat: Chat, turn: int, whole: str) -> int:
    before = template.render(chat.turns[:turn], add_generation_prompt=True, place=chat.place)
    if whole.startswith(before):
        return len(before)
    raise ValueError(
        f"{chat.place}: cannot tell answers from prompts: the chat template of {template.origin} renders the turns "
        f"before turn {turn + 1} otherwise than it begins the whole conversation; put {{% generation %}} and "
        "{% endgeneration %} around what the assistant says in a copy of it, and name that copy"
    )


def _end(template: ChatTemplate, chat: Chat, turn: int, whole: str, following: int) -> int:
    """Where the next turn begins, or at the least the following answer."""
    if following == len(whole):
        return following
    upto = template.render(chat.turns[: turn + 1], place=chat.place)
    return len(upto) if whole.startswith(upto) else following


def _located(template: ChatTemplate, chat: Chat, turn: int, whole: str, start: int, end: int) -> Span:
    for text in (chat.turns[turn].text, chat.turns[turn].text.strip()):
        place = whole.find(text, start, end)
        if whole.count(text, start, end) > 1:
            place = max(place, _written_at(template, chat, turn, start))
        if whole.startswith(text, place) and place >= 0:
            return Span(start, place, place + len(text), end)
    raise ValueError(
        f"{chat.place}: the chat template of {template.origin} does not write the answer in turn {turn + 1} as it "
        "stands"
    )


def _written_at(template: ChatTemplate, chat: Chat, turn: int, start: int) -> int:
    """Where the template writes the text of a turn: there a character stands that is in nobody's text."""
    mark = "\ue000"
    turns = [*chat.turns[:turn], dataclasses.replace(chat.turns[turn], text=mark), *chat.turns[turn + 1 :]]
    return template.render(turns, place=chat.place).find(mark, start)


def _inside(whole: str, start: int, end: int, last: str) -> Span:
    """A marked answer. The text within is looked for only for `encode_choices`, where there is a single answer."""
    text = last.strip()
    place = whole.find(text, start, end)
    inner = (place, place + len(text)) if place >= 0 else (start, end)
    return Span(start, *inner, end, marked=True)


class Tokens:
    """A text's tokens with the characters they stand for.

    Attributes:
      ids: int32 `(t,)`.
      starts, ends: the characters that each token covers, int `(t,)`. Of tokens that share a character of several
        bytes, each covers it.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.ids = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        self.starts, self.ends = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])

    def first_after(self, character: int) -> int:
        """The first token that covers this character or a later one."""
        return int(np.searchsorted(self.ends, character, side="right"))

    def first_from(self, character: int) -> int:
        """The first token that begins at this character or later."""
        return int(np.searchsorted(self.starts, character, side="left"))


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Encoding]:
    """Each text's encoding with exact offsets: no padding, truncation, added tokens or trimmed spaces."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    plain.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    for start in range(0, len(texts), 1024):  # an Encoding takes far more memory than its tokens
        yield from plain.encode_batch(list(texts[start : start + 1024]), add_special_tokens=False)


def special_ids(tokenizer: Tokenizer, template: ChatTemplate) -> np.ndarray:
    """The ids of special tokens, the template's `bos_token` and `eos_token` among them: int `(n,)`."""
    named = (tokenizer.token_to_id(t) for t in (template.bos_token, template.eos_token) if t)
    added = (i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return np.array(sorted({*(i for i in named if i is not None), *added}), np.int64)


def _encoded(
    chats: Sequence[Chat], tokenizer: Tokenizer, template: ChatTemplate, answers: Answers
) -> Iterable[tuple[Chat, Encoding, list[Span]]]:
    found = [find_answers(template, chat, answers) for chat in chats]
    encodings = tokenize([text for text, _ in found], tokenizer)
    return zip(chats, encodings, [spans for _, spans in found], strict=True)


def _stop(
    tokens: Tokens, span: Span, special: np.ndarray, bos: int | None, chat: Chat, template: ChatTemplate
) -> int:
    """One past an answer's last token, its end-of-turn token included."""
    if span.marked:
        return tokens.first_from(span.end)
    header = tokens.ids[tokens.first_from(span.start) : tokens.first_after(span.text)]
    if np.isin(header, special).any():
        raise ValueError(
            f"{chat.place}: the chat template of {template.origin} starts answers with special tokens that its "
            "generation prompt lacks: it must honour add_generation_prompt, or have {% generation %} blocks"
        )
    first = tokens.first_from(span.text_end)
    after = tokens.ids[first : tokens.first_from(span.end)]
    (ends,) = np.nonzero(np.isin(after, special))
    if not len(ends) or after[ends[0]] == bos:
        raise ValueError(
            f"{chat.place}: the chat template of {template.origin} writes no special token after an answer, so the "
            "model would never learn to stop; or the tokenizer does not know the token that it writes"
        )
    return first + int(ends[0]) + 1


def _check_answers(chats: Sequence[Chat], prompts: Sequence[int], max_length: int) -> None:
    """No conversation without an answer token; `prompts` are the numbers of tokens before the first one."""
    lost = [(chat, n) for chat, n in zip(chats, prompts, strict=True) if n >= max_length]
    if lost:
        longest = max(n for _, n in lost)
        shown = [f"{chat.place}: {n} tokens before the answer" for chat, n in lost[:SHOWN]]
        more = [f"... and {len(lost) - SHOWN} more"] if len(lost) > SHOWN else []
        raise ValueError(
            "\n  ".join(
                [
                    f"max_length {max_length} leaves no answer token in {len(lost)} of {len(chats)} conversations, "
                    f"with prompts of up to {longest} tokens: raise it or remove them",
                    *shown,
                    *more,
                ]
            )
        )
