"""The tokenizer in a GGUF file's metadata.

They contain the vocabulary, but only the name of its pre-tokenizer; the regular expressions here come from the
models' own tokenizer.json.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...._utils.validation import suggest
from .header import Gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_DIGITS = "digits"
_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3")
"""Those of which llama.cpp adds BOS if the file does not say."""
# Supported values of `tokenizer.ggml.pre`: a regular expression, digits (split, then as GPT-2), or None for GPT-2.
_PRE_TOKENIZERS: Mapping[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    # SmolLM3 has smaug-bpe, and OLMo 2 has dbrx.
    **dict.fromkeys((*_WITH_BOS, "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
}
# Characters of a token in a GGUF file, whose every split is tried.
_MAX_PIECE = 2**12
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def special_tokens(file: Gguf) -> dict[str, str]:
    """The texts of the special tokens; raises ValueError if one is not in the vocabulary."""
    tokens = _tokens(file)
    numbers = {role: file.one(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    return {role: _token(file, tokens, n) for role, n in numbers.items() if n is not None}


def make_tokenizer(file: Gguf) -> "Tokenizer":
    """The tokenizer that the metadata describe.

    Raises:
      ValueError: the file has none, or one of an unknown kind.
    """
    from tokenizers import AddedToken

    kind = file.one("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model must be one of {', '.join(makers)}, got {kind!r:.80}"
        )
    tokens = _tokens(file)
    has_kinds = "tokenizer.ggml.token_type" in file.metadata
    kinds = _numbers(file, "token_type", len(tokens)) if has_kinds else [_NORMAL] * len(tokens)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        duplicate = next(t for n, t in enumerate(tokens) if vocabulary[t] != n)
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens contains {duplicate!r:.80} twice")
    try:
        result = makers[kind](file, vocabulary, kinds)
        # Control and user-defined tokens are never split.
        control = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _UNKNOWN) and t]
        user = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _USER and t]
        result.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
        result.add_tokens([AddedToken(t, special=False, normalized=False) for t in user])
        _add_bos_eos(result, file, tokens)
    except ValueError:
        raise
    # The library raises bare Exception.
    except Exception as error:
        raise ValueError(f"{file.path}: invalid tokenizer metadata: {error}") from error
    return result


def _tokens(file: Gguf) -> list[str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(
            f"{file.path} has no tokenizer: tokenizer.ggml.tokens must be a non-empty list of strings"
        )
    if (longest := max(map(len, tokens))) > _MAX_PIECE:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.tokens has one of {longest} characters, at most {_MAX_PIECE}"
        )
    return tokens


def _numbers(file: Gguf, key: str, count: int) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, np.ndarray) or len(values) != count or not np.all(np.isfinite(values)):
        raise ValueError(f"{file.path}: tokenizer.ggml.{key} must be {count} numbers, one per token")
    return values.tolist()


def _token(file: Gguf, tokens: Sequence[str], number: Any) -> str:
    if type(number) is not int or not 0 <= number < len(tokens):
        raise ValueError(
            f"{file.path}: special token id {number!r:.80} is outside the vocabulary of {len(tokens)} tokens"
        )
    return tokens[number]


def _byte_level(file: Gguf, vocabulary: dict[str, int], kinds: list[int]) -> "Tokenizer":
    """Byte-level BPE as in GPT-2, with the merges in the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges, name = file.metadata.get("tokenizer.ggml.merges"), file.one("tokenizer.ggml.pre", "default")
    if not isinstance(merges, list):
        raise ValueError(f"{file.path}: tokenizer.ggml.merges must be a list of strings, got {merges!r:.80}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if invalid := [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise ValueError(
            f"{file.path}: each merge must be two strings separated by a space, got {invalid[0]!r:.80}"
        )
    if name not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre must be one of {', '.join(sorted(_PRE_TOKENIZERS))}, "
            f"got {name!r:.80}{suggest(str(name), _PRE_TOKENIZERS, fallback=False)}"
        )
    pattern, space = _PRE_TOKENIZERS[name], bool(file.one("tokenizer.ggml.add_space_prefix", False))
    # As in Llama 3's tokenizer.json: a word that is a token is not split further, whatever the merges.
    ignore_merges = pattern == _LLAMA3
    result = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=ignore_merges))  # pyright: ignore[reportArgumentType]
    steps: list[Any] = [pre_tokenizers.ByteLevel(space, use_regex=pattern in (None, _DIGITS))]
    if pattern == _DIGITS:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    result.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    if pattern == _QWEN2:
        result.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    result.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return result


def _sentencepiece(file: Gguf, vocabulary: dict[str, int], kinds: list[int]) -> "Tokenizer":
    """SentencePiece BPE: of all adjacent pairs that form a piece, merges the one with the best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _numbers(file, "scores", len(vocabulary))
    pieces = {t: n for t, n in vocabulary.items() if kinds[n] not in (_UNKNOWN, _CONTROL, _USER, _BYTE)}
    splits = [
        (-scores[number], number, pieces[token[:i]], pieces[token[i:]], i, token)
        for token, number in pieces.items()
        for i in range(1, len(token))
        if token[:i] in pieces and token[i:] in pieces
    ]
    merges = [(token[:i], token[i:]) for *_, i, token in sorted(splits)]
    space = bool(file.one("tokenizer.ggml.add_space_prefix", True))
    unknown = next((token for token, n in vocabulary.items() if kinds[n] == _UNKNOWN), None)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    result = Tokenizer(model)
    first = [normalizers.Prepend("▁")] if space else []
    result.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])  # pyright: ignore
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    result.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if space else [])])  # pyright: ignore
    return result


def _add_bos_eos(result: "Tokenizer", file: Gguf, tokens: Sequence[str]) -> None:
    """Makes the tokenizer add BOS and EOS as the file says, or else by llama.cpp's defaults."""
    from tokenizers import processors

    by_default = file.one("tokenizer.ggml.model") == "llama" or file.one("tokenizer.ggml.pre") in _WITH_BOS
    add = {
        "bos": file.one("tokenizer.ggml.add_bos_token", by_default),
        "eos": file.one("tokenizer.ggml.add_eos_token", False),
    }
    numbers = {end: file.one(f"tokenizer.ggml.{end}_token_id") for end, is_added in add.items() if is_added}
    special = {end: _token(file, tokens, n) for end, n in numbers.items() if n is not None}
    if not special:
        return
    left, right = [[special[e]] if e in special else [] for e in ("bos", "eos")]
    pair = [*left, "$A", *right, *(f"{t}:1" for t in (*left, "$B", *right))]
    result.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[*left, "$A", *right],
        pair=pair,
        special_tokens=[(token, tokens.index(token)) for token in set(special.values())],
    )
