"""Tokenizes conversations with a loss mask that covers only the assistant's answers."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from .chat_template import ChatTemplate, Rendering
from .conversations import Chat, Turn
from .packed_rows import ragged
from .readers import Problems

AnswerChoice = Literal["all", "last"]
# Stands for a text whose place in a rendering is searched: a private-use character, which no template writes.
MARK = "\ue000"


@dataclasses.dataclass(frozen=True)
class AnswerSpan:
    """Character range of an answer in a rendered conversation.

    Attributes:
      start: first character after the generation prompt, or start of a `{% generation %}` block.
      text: first character of the assistant's text, or of its tool calls if there is none.
      text_end: end of that text, or of the last tool call.
      end: start of the next turn, or end of a `{% generation %}` block.
      marked: whether `start` and `end` are exact: a `{% generation %}` block or a plain text.
    """

    start: int
    text: int
    text_end: int
    end: int
    marked: bool = False


def tokenize_chats(
    chats: Sequence[Chat],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    *,
    answers: AnswerChoice = "all",
    start: np.ndarray = np.zeros(0, np.int32),  # noqa: B008
) -> tuple[dict[str, np.ndarray], int]:
    """Tokenizes conversations and marks the answer tokens, on which the loss is computed.

    An answer is everything after the generation prompt, up to and including the first special token after the
    assistant's text and tool calls (the end of the turn). If the template has `{% generation %}` blocks, the
    answers are the contents of the blocks. A token that spans the end of a prompt and the start of an answer
    belongs to the answer. Turns that are not `trained` are no answers.

    Each conversation is tokenized as one string. Text that looks like a special token becomes one.

    Args:
      chats: N conversations.
      tokenizer: the model's `ModelFiles.plain_tokenizer`.
      template: the chat template.
      max_length: maximum tokens per conversation; longer ones are truncated.
      answers: whether all turns of the assistant count as answers, or only the last.
      start: what precedes plain texts that do not start with it, from `leading_ids`; a template writes its own.

    Returns:
      Ragged columns of int32 `input_ids` and float32 `loss_mask`: 1 for tokens to predict, 0 for others and the
      first token. Then the number of truncated conversations.

    Raises:
      ValueError: the template fails, does not write the answers verbatim, ignores tools, or does not show where
        answers start and end; or a conversation has no answer token within `max_length`.
    """
    special = special_ids(tokenizer, template)
    # GPT-2 has one token for both, which ends an answer.
    bos_token = "" if template.bos_token == template.eos_token else template.bos_token
    bos = tokenizer.token_to_id(bos_token or "\0")
    ids, masks, prompts = [], [], []
    rendered = find_answers(template, chats, answers)
    encodings = tokenize([text for text, _ in rendered], tokenizer)
    for chat, (_, spans), encoding in zip(chats, rendered, encodings, strict=True):
        tokens = Tokens(encoding)
        mask = np.zeros(len(tokens.ids), np.float32)
        for span in spans:
            first = tokens.first_after(span.start)
            mask[first : _answer_stop(tokens, span, special, bos, chat, template)] = 1
        token_ids = tokens.ids
        if chat.turns[0].role == "text" and not np.array_equal(token_ids[: len(start)], start):
            token_ids, mask = np.append(start, token_ids), np.append(np.zeros(len(start), mask.dtype), mask)
        # Nothing precedes the first token, of which it could be predicted.
        mask[:1] = 0
        prompts.append(int(mask.argmax()) if mask.any() else len(mask))
        ids.append(token_ids)
        masks.append(mask)
    too_long = [(chat.place, n) for chat, n in zip(chats, prompts, strict=True) if n >= max_length]
    if too_long:
        longest = max(n for _, n in too_long)
        advice = f"max_length {max_length} leaves no answer token: set more than {longest}, or remove the row"
        Problems((place, f"{n} tokens before the answer; {advice}") for place, n in too_long).report()
    truncated = sum(len(x) > max_length for x in ids)
    columns = {"input_ids": ids, "loss_mask": masks}
    return {name: ragged(x[:max_length] for x in values) for name, values in columns.items()}, truncated


def find_answers(
    template: ChatTemplate, chats: Sequence[Chat], answers: AnswerChoice = "all"
) -> list[tuple[str, list[AnswerSpan]]]:
    """Renders conversations and locates the assistant's answers; a plain text is a single answer.

    An answer starts where the rendering of the turns before it, with the generation prompt, ends.

    Raises:
      ValueError: that rendering is not a prefix of the full one, or is not followed by the answer's text; or the
        template ignores tools, or calls or results of tools.
    """
    calls = [(_calls(template, chat, answers), chat.tools, chat.place) for chat in chats]
    renderings = template.render_chats(calls)
    return [_locate(template, *found, answers) for found in zip(chats, renderings, strict=True)]


def _calls(template: ChatTemplate, chat: Chat, answers: AnswerChoice) -> list[tuple[Sequence[Turn], bool]]:
    """What to render of a conversation: the whole, what precedes each answer, and what ends with it."""
    if chat.turns[0].role == "text":
        return []
    if template.marks_answers:
        return [(chat.turns, False)]
    turns, last = _answers(chat, answers), len(chat.turns) - 1
    # An answer that ends the whole needs no rendering of its own.
    ends = [(chat.turns[: turn + 1], False) for turn in turns if turn < last]
    return [(chat.turns, False), *((chat.turns[:turn], True) for turn in turns), *ends]


def _answers(chat: Chat, answers: AnswerChoice) -> list[int]:
    turns = [i for i, turn in enumerate(chat.turns) if turn.role == "assistant" and turn.trained]
    return turns[-1:] if answers == "last" else turns


def _locate(
    template: ChatTemplate, chat: Chat, renderings: Sequence[Rendering], answers: AnswerChoice
) -> tuple[str, list[AnswerSpan]]:
    if chat.turns[0].role == "text":
        text = chat.turns[0].text
        return text, [AnswerSpan(0, 0, len(text), len(text), marked=True)]
    rendered, blocks = renderings[0]
    call_ends = _find_calls(template, chat, rendered)
    if template.marks_answers:
        return rendered, _find_blocks(template, chat, rendered, blocks, answers)
    turns, parts = _answers(chat, answers), [text for text, _ in renderings[1:]]
    for turn, prompt in zip(turns, parts, strict=False):
        if not rendered.startswith(prompt):
            raise ValueError(
                f"{chat.place}: cannot locate the answer in turn {turn + 1}: without it, the chat template of "
                f"{template.origin} renders the earlier turns differently; put {{% generation %}} and "
                "{% endgeneration %} around the assistant's text and the token that ends it, in a copy, and set "
                "data.template to that copy"
            )
    starts = [len(prompt) for prompt in parts[: len(turns)]]
    ends, spans = [*parts[len(turns) :], rendered], []
    for turn, start, end, with_turn in zip(turns, starts, [*starts[1:], len(rendered)], ends, strict=False):
        # The next turn is usually the user's and starts before the next answer.
        if end < len(rendered) and rendered.startswith(with_turn):
            end = len(with_turn)
        if turn in call_ends and not chat.turns[turn].text.strip():
            # What an answer in text would start with as well is its header.
            plain = (*chat.turns[:turn], Turn("assistant", MARK))
            plain = template.render(plain, tools=chat.tools, place=chat.place)
            text = max(start, _count_equal(rendered, plain))
            spans.append(AnswerSpan(start, text, call_ends[turn], end))
        else:
            span = _find_text(template, chat, turn, rendered, start, end)
            spans.append(dataclasses.replace(span, text_end=call_ends.get(turn, span.text_end)))
    return rendered, spans


def _find_blocks(
    template: ChatTemplate, chat: Chat, rendered: str, blocks: list[tuple[int, int]], answers: AnswerChoice
) -> list[AnswerSpan]:
    answered = [turn for turn in chat.turns if turn.role == "assistant"]
    if not all(turn.trained for turn in answered):
        if len(blocks) != len(answered):
            raise ValueError(
                f"{chat.place}: weights require one {{% generation %}} block for each assistant turn, but the "
                f"chat template of {template.origin} has {len(blocks)} for {len(answered)}"
            )
        blocks = [block for turn, block in zip(answered, blocks, strict=True) if turn.trained]
    text, spans = [turn for turn in answered if turn.trained][-1].text.strip(), []
    for start, end in blocks:
        if end > start:
            # Only `tokenize_choices` uses the bounds of the text, and its conversations have a single answer.
            offset = rendered.find(text, start, end)
            bounds = (offset, offset + len(text)) if offset >= 0 else (start, end)
            spans.append(AnswerSpan(start, *bounds, end, marked=True))
    if not spans:
        raise ValueError(
            f"{chat.place}: the {{% generation %}} blocks of the chat template of {template.origin} are empty: "
            "put the assistant's text and the token that ends it inside them"
        )
    return spans[-1:] if answers == "last" else spans


def _find_calls(template: ChatTemplate, chat: Chat, rendered: str) -> dict[int, int]:
    """Returns where the tool calls of each turn end in a rendering.

    Raises:
      ValueError: the template ignores the tools, or calls or results of tools.
    """

    def ignores(what: str) -> ValueError:
        return ValueError(
            f"{chat.place}: the chat template of {template.origin} does not write {what}; remove them, or set "
            "data.template to a template for tools"
        )

    if chat.tools and template.render(chat.turns, place=chat.place) == rendered:
        raise ignores("the tools of the column tools")
    changed: dict[int, Turn] = {}
    for i, turn in enumerate(chat.turns):
        if turn.role == "tool":
            changed[i] = dataclasses.replace(turn, text=MARK)
        elif turn.extra:
            extra = json.loads(turn.extra)
            extra["tool_calls"][-1]["function"]["arguments"] = {MARK: MARK}
            changed[i] = dataclasses.replace(turn, extra=json.dumps(extra, ensure_ascii=False))
    if not changed:
        return {}
    calls = [((*chat.turns[:i], turn, *chat.turns[i + 1 :]), False) for i, turn in changed.items()]
    (variants,) = template.render_chats([(calls, chat.tools, chat.place)])
    results = {i: Turn("assistant", turn.text) for i, turn in enumerate(chat.turns) if turn.role == "tool"}
    # A template may know only the user, and take all others for the assistant.
    try:
        said = [results.get(i, turn) for i, turn in enumerate(chat.turns)]
        confused = bool(results) and template.render(said, tools=chat.tools, place=chat.place) == rendered
    except ValueError:
        confused = False
    ends = {}
    for (i, turn), (variant, _) in zip(changed.items(), variants, strict=True):
        if variant == rendered or (confused and turn.role == "tool"):
            kind = "messages of the role tool" if turn.role == "tool" else "tool calls"
            raise ignores(f"{kind} (turn {i + 1})")
        if turn.role == "assistant":
            ends[i] = len(rendered) - _count_equal(reversed(rendered), reversed(variant))
    return ends


def _count_equal(first: Iterable[str], second: Iterable[str]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _find_text(
    template: ChatTemplate, chat: Chat, turn: int, rendered: str, start: int, end: int
) -> AnswerSpan:
    for text in (chat.turns[turn].text, chat.turns[turn].text.strip()):
        offset = rendered.find(text, start, end)
        if rendered.count(text, start, end) > 1:
            # The template may repeat the text or contain it elsewhere, such as in a header. Render a mark instead
            # of the text, and take its position.
            turns = list(chat.turns)
            turns[turn] = dataclasses.replace(turns[turn], text=MARK)
            marked = template.render(turns, tools=chat.tools, place=chat.place)
            offset = max(offset, marked.find(MARK, start))
        if offset >= 0 and rendered.startswith(text, offset):
            return AnswerSpan(start, offset, offset + len(text), end)
    raise ValueError(
        f"{chat.place}: the chat template of {template.origin} does not write the answer in turn {turn + 1} "
        "verbatim: it may only strip surrounding whitespace"
    )


class Tokens:
    """Tokens of a text with their character offsets.

    Attributes:
      ids: token ids, int32 `(t,)`.
      starts, ends: character range of each token, int `(t,)`. Tokens that share a multi-byte character cover it.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.ids = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # Tokens of one multi-byte character all have its range; a binary search needs ends that never fall.
        self.starts, self.ends = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])

    def first_after(self, character: int) -> int:
        """Index of the first token that covers this character or a later one."""
        return int(np.searchsorted(self.ends, character, side="right"))

    def first_from(self, character: int) -> int:
        """Index of the first token that starts at this character or later."""
        return int(np.searchsorted(self.starts, character, side="left"))


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Encoding]:
    """Yields each text's encoding by `ModelFiles.plain_tokenizer`, without added tokens."""
    # In pieces: an Encoding takes far more memory than its tokens.
    for start in range(0, len(texts), 1024):
        yield from tokenizer.encode_batch(list(texts[start : start + 1024]), add_special_tokens=False)


def leading_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the special tokens that `ModelFiles.tokenizer` puts before a text, such as BOS: int32 `(n,)`."""
    encoding = tokenizer.encode("a")
    is_special = [*encoding.special_tokens_mask, 0]
    return np.array(encoding.ids[: is_special.index(0)], np.int32)


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, bool] | None:
    """Returns the id of the special token that ends an answer, and whether the loss covers it.

    None if the template writes no such token, or does not show where answers are: it can generate, but not train.
    """
    chat = Chat((Turn("user", "Is it?"), Turn("assistant", "Yes.")))
    try:
        ((text, spans),) = find_answers(template, [chat])
    except ValueError:
        return None
    (encoding,) = tokenize([text], tokenizer)
    tokens, span = Tokens(encoding), spans[-1]
    first = tokens.first_from(span.text_end)
    (ends,) = np.nonzero(np.isin(tokens.ids[first:], special_ids(tokenizer, template)))
    if not len(ends):
        return None
    end = first + int(ends[0])
    return int(tokens.ids[end]), end < tokens.first_from(span.end)


def special_ids(tokenizer: Tokenizer, template: ChatTemplate) -> np.ndarray:
    """Ids of the special tokens, including the template's `bos_token` and `eos_token`: int `(n,)`."""
    named = (tokenizer.token_to_id(t) for t in (template.bos_token, template.eos_token) if t)
    added = (i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return np.array(sorted({*(i for i in named if i is not None), *added}), np.int64)


def _answer_stop(
    tokens: Tokens, span: AnswerSpan, special: np.ndarray, bos: int | None, chat: Chat, template: ChatTemplate
) -> int:
    """Index one past the answer's last token; unless the span is marked, that is the end-of-turn token."""
    if span.marked:
        return tokens.first_from(span.end)
    header = tokens.ids[tokens.first_from(span.start) : tokens.first_after(span.text)]
    if np.isin(header, special).any():
        raise ValueError(
            f"{chat.place}: the chat template of {template.origin} starts answers with special tokens that its "
            "generation prompt lacks: support add_generation_prompt or add {% generation %} blocks"
        )
    first = tokens.first_from(span.text_end)
    after = tokens.ids[first : tokens.first_from(span.end)]
    (ends,) = np.nonzero(np.isin(after, special))
    if not len(ends) or after[ends[0]] == bos:
        raise ValueError(
            f"{chat.place}: the chat template of {template.origin} writes no special token after an answer, so the "
            "model would not learn to stop: end answers with a special token of the tokenizer"
        )
    return first + int(ends[0]) + 1
