"""Tokenizes texts for encoders."""

import json
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from ..models.checkpoints.model_files import ModelFiles
from .packed_rows import ragged
from .splits import LabelledText


def truncating_tokenizer(files: ModelFiles, max_length: int) -> Tokenizer:
    """A copy of a model's tokenizer that truncates to `max_length` tokens."""
    tokenizer = files.new_tokenizer()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def unknown_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that say nothing of a text: those of an empty one and, if there is one, the unknown token's."""
    model = json.loads(tokenizer.to_str())["model"]  # which names its token or, with Unigram, its id
    unknown = model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))
    return {*tokenizer.encode("").ids, *tokenizer.encode("", "").ids} | {unknown}


def input_warnings(
    rows: Sequence[LabelledText], inputs: Sequence[np.ndarray], tokenizer: Tokenizer
) -> list[str]:
    """Warns of texts without a known token, and of different texts with equal tokens but different labels.

    Equal texts with different labels are reported by `duplicates.handle_duplicates`.
    """
    lines, ignored = list[str](), unknown_ids(tokenizer)
    unknown = [row.place for row, ids in zip(rows, inputs, strict=True) if ignored.issuperset(ids.tolist())]
    if unknown:
        lines.append(
            f"warning: {len(unknown):,} of {len(rows):,} texts have no token that the tokenizer knows, such as "
            f"{unknown[0]}"
        )
    groups: dict[bytes, list[LabelledText]] = {}
    for row, ids in zip(rows, inputs, strict=True):
        groups.setdefault(ids.tobytes(), []).append(row)
    unclear = list[tuple[LabelledText, LabelledText, int]]()
    for first, *others in groups.values():
        differing = (x for x in others if x.label_key != first.label_key and x.key != first.key)
        if (other := next(differing, None)) is not None:
            unclear.append((first, other, 1 + len(others)))
    if unclear:
        first, other, _ = unclear[0]
        count = sum(size for *_, size in unclear)
        lines.append(
            f"warning: {count:,} of {len(rows):,} texts have the same tokens as others with another label, such as "
            f"{first.place} and {other.place}"
        )
    return lines


def encode_texts(
    texts: Sequence[tuple[str, ...]], tokenizer: Tokenizer, max_length: int
) -> tuple[dict[str, np.ndarray], int]:
    """Tokenizes N texts, each alone or all with a second text, with a tokenizer from `truncating_tokenizer`.

    Returns:
      Ragged columns of int32 `input_ids` and `token_type_ids`; and the number of truncated texts. Special tokens
      are never truncated.

    Raises:
      ValueError: `max_length` leaves no room for the text, or a text has no tokens.
    """
    special = tokenizer.num_special_tokens_to_add(any(len(parts) == 2 for parts in texts))
    if max_length <= special:
        raise ValueError(
            f"max_length must be above {special}, the number of special tokens, got {max_length}"
        )
    inputs = [parts[0] if len(parts) == 1 else parts for parts in texts]
    ids, types, truncated = [], [], 0
    # In pieces: an Encoding takes far more memory than its tokens.
    for start in range(0, len(inputs), 1024):
        for encoding in tokenizer.encode_batch_fast(inputs[start : start + 1024]):
            ids.append(np.array(encoding.ids, np.int32))
            types.append(np.array(encoding.type_ids, np.int32))
            truncated += bool(encoding.overflowing)
    if empty := [text for text, tokens in zip(inputs, ids, strict=True) if not len(tokens)]:
        raise ValueError(
            f"texts without tokens: {len(empty)}, the first is {empty[0]!r:.80}; remove them, or use a tokenizer "
            "that adds special tokens"
        )
    return {"input_ids": ragged(ids), "token_type_ids": ragged(types)}, truncated
