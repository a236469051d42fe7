"""Tokenizes texts into arrays of one length."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .._utils.json_files import MAX_LIST_BYTES, read_json
from ..models.tokenizer import read_tokenizer_json
from .batches import Batch


def load_tokenizer(directory: Path, max_length: int) -> Tokenizer:
    """Loads `tokenizer.json`, set to truncate and pad on the right to exactly `max_length` tokens.

    Padding and truncation in the file are replaced. The pad token is the first in the vocabulary of: that of the
    file's padding, `pad_token` in `tokenizer_config.json`, `[PAD]`, `<pad>`, and the end-of-text token.

    Raises:
      ValueError: the file is missing or invalid, or no pad token is found.
    """
    tokenizer = read_tokenizer_json(directory)
    token = _pad_token(tokenizer, directory / "tokenizer_config.json")
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(token), pad_token=token, length=max_length)
    return tokenizer


def _pad_token(tokenizer: Tokenizer, config_path: Path) -> str:
    config = read_json(config_path, limit=MAX_LIST_BYTES) if config_path.exists() else {}
    names = [config.get("pad_token"), "[PAD]", "<pad>", config.get("eos_token"), "</s>", "<|endoftext|>"]
    for token in [(tokenizer.padding or {}).get("pad_token"), *names]:
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and tokenizer.token_to_id(token) is not None:
            return token
    raise ValueError(f"no pad token found: set pad_token to a token of the vocabulary in {config_path}")


def encode_texts(texts: Sequence[tuple[str, ...]], tokenizer: Tokenizer) -> tuple[Batch, int]:
    """Tokenizes N texts, each alone or all with a second text, with a tokenizer from `load_tokenizer`.

    Returns:
      int32 `input_ids`, `attention_mask` and `token_type_ids`, each `(N, T)`, with T the tokenizer's `max_length`;
      and the number of truncated texts. Special tokens are never truncated.

    Raises:
      ValueError: `max_length` leaves no room for the text, or a text has no tokens.
    """
    if tokenizer.truncation is None:
        raise ValueError("the tokenizer has no max_length: load it with load_tokenizer")
    length = tokenizer.truncation["max_length"]
    special = tokenizer.num_special_tokens_to_add(any(len(parts) == 2 for parts in texts))
    if length <= special:
        raise ValueError(f"max_length must be above {special}, the number of special tokens, got {length}")
    inputs = [parts[0] if len(parts) == 1 else parts for parts in texts]
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    arrays = {name: np.zeros((len(inputs), length), np.int32) for name in columns}
    truncated = 0
    # In pieces: an Encoding takes far more memory than its row.
    for start in range(0, len(inputs), 1024):
        encodings = tokenizer.encode_batch_fast(inputs[start : start + 1024])
        truncated += sum(bool(e.overflowing) for e in encodings)
        for name, attribute in columns.items():
            arrays[name][start : start + 1024] = [getattr(e, attribute) for e in encodings]
    if (empty := np.flatnonzero(~arrays["attention_mask"].any(axis=1))).size:
        raise ValueError(
            f"texts without tokens: {empty.size}, the first is {inputs[empty[0]]!r:.80}; remove them, or use a "
            "tokenizer that adds special tokens"
        )
    return arrays, truncated
