"""Tokenizes texts for encoders."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from ..models.checkpoints.model_files import ModelFiles
from .packed_rows import ragged


def truncating_tokenizer(files: ModelFiles, max_length: int) -> Tokenizer:
    """A copy of a model's tokenizer that truncates to `max_length` tokens."""
    tokenizer = files.new_tokenizer()
    tokenizer.enable_truncation(max_length)
    return tokenizer


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
