"""Tokenizer, chat template and special tokens of a model, from a Hugging Face directory or a GGUF file.

A GGUF file contains the vocabulary, but only the name of its pre-tokenizer; the regular expressions here come from
the models' own tokenizer.json.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._utils.json_files import MAX_LIST_BYTES, read_json, read_text
from .._utils.untrusted import run_job
from .._utils.validation import suggest
from .checkpoints.gguf import load as gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_DIGITS = "digits"
# Supported values of `tokenizer.ggml.pre`: a regular expression, digits (split, then as GPT-2), or None for GPT-2.
_PRE_TOKENIZERS: Mapping[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt"), None),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
}
# Digests of the files that this process has tried: a run loads its tokenizer several times.
_TRIED: set[bytes] = set()
# Characters of a token in a GGUF file, whose every split is tried.
_MAX_PIECE = 2**12
_IMAGE_TOKEN = "<image_soft_token>"  # of Gemma 3
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer in `tokenizer.json` or a GGUF file's metadata, without padding and truncation.

    Raises:
      ValueError: the tokenizer is missing, damaged or of an unknown kind, or has more tokens than the model's
        embedding has rows.
      ImportError: tokenizers, or for a GGUF file gguf, is not installed.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "reading a tokenizer needs tokenizers: pip install 'loraplus_jax[train]'"
        ) from error
    path = Path(path)
    if (gguf_path := gguf.find(path)) is not None:
        file = gguf.read(gguf_path)
        result, rows = _from_gguf(file), gguf.embedding_rows(file)
    else:
        _check_directory(path)
        result = read_tokenizer_json(path)
        result.no_padding()
        result.no_truncation()
        config = path / "config.json"
        rows = read_json(config).get("vocab_size") if config.exists() else None
    if type(rows) is int:
        result = _without_image_token(result, rows)
        check_ids(result, path, rows)
    return result


def _without_image_token(tokenizer: "Tokenizer", rows: int) -> "Tokenizer":
    """Leaves out Gemma 3's token for an image where the embedding is that of a model of text alone.

    Both have one tokenizer file. Other tokens beyond the embedding are a mistake.
    """
    added = tokenizer.get_added_tokens_decoder()
    if not any(number >= rows and token.content == _IMAGE_TOKEN for number, token in added.items()):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != _IMAGE_TOKEN]
    return type(tokenizer).from_str(json.dumps(content))


def check_ids(
    tokenizer: "Tokenizer", path: Path, rows: int, *, types: int | None = None, pairs: bool = False
) -> None:
    """Raises ValueError if a tokenizer makes ids that the model's tables lack; JAX would read NaN there.

    The ids of special tokens and the types are its post-processor's, which may contradict the vocabulary.

    Args:
      tokenizer: the tokenizer.
      path: its directory or file, for the message.
      rows: rows of the model's token embedding.
      types: rows of its token type embedding; None if it has none.
      pairs: whether the model reads pairs of texts.
    """
    sample = tokenizer.encode("a", "a") if pairs else tokenizer.encode("a")
    ids = tokenizer.get_vocab() | dict(zip(sample.tokens, sample.ids, strict=True))
    token, last = max(ids.items(), key=lambda item: item[1], default=("", -1))
    if last >= rows:
        raise ValueError(
            f"the tokenizer in {path} does not fit the model: token {token!r} has id {last}, but the embedding has "
            f"{rows} rows (vocab_size)"
        )
    if types is not None and (last := max(sample.type_ids, default=0)) >= types:
        raise ValueError(
            f"the tokenizer in {path} does not fit the model: it gives {'pairs of texts' if pairs else 'texts'} "
            f"token type {last}, but the token type embedding has {types} rows (type_vocab_size)"
        )


def read_chat_template(path: str | Path) -> str | None:
    """The Jinja chat template, the default one if there are several; None if there is none.

    Raises:
      ValueError: a file cannot be read.
    """
    path = Path(path)
    if (gguf_path := gguf.find(path)) is not None:
        source, template = gguf_path, gguf.read(gguf_path).one("tokenizer.chat_template")
    else:
        _check_directory(path)
        if (jinja := path / "chat_template.jinja").exists():
            return read_text(jinja)
        template, source = _tokenizer_config(path).get("chat_template"), path / "tokenizer_config.json"
        if isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{source}: the chat template must be a string, got {template!r:.80}")
    return template


def special_tokens(path: str | Path) -> dict[str, str]:
    """The texts of `bos_token`, `eos_token`, `pad_token` and `unk_token`, as far as the model defines them.

    A directory defines them in `tokenizer_config.json`. If that does not mention `bos_token` or `eos_token`, as in
    GPT-2's, its id in `config.json` decides.

    Raises:
      ValueError: a file cannot be read, or a special token is not in the vocabulary.
    """
    path = Path(path)
    if (gguf_path := gguf.find(path)) is not None:
        file = gguf.read(gguf_path)
        tokens = _tokens(file)
        numbers = {role: file.one(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
        return {role: _token(file, tokens, n) for role, n in numbers.items() if n is not None}
    settings = _tokenizer_config(path)
    values = {role: settings.get(role) for role in _ROLES}
    texts = {role: t.get("content") if isinstance(t, dict) else t for role, t in values.items()}
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    unnamed = {role: config.get(f"{role}_id") for role in ("bos_token", "eos_token") if role not in settings}
    numbers = {role: n for role, n in unnamed.items() if type(n) is int and 0 <= n < 2**31}
    if numbers and (path / "tokenizer.json").exists():
        tokenizer = read_tokenizer_json(path)
        texts |= {role: tokenizer.id_to_token(n) for role, n in numbers.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def stop_ids(path: str | Path) -> tuple[int, ...]:
    """Ids that end a text according to the model's files: end-of-text and, if known, end-of-turn.

    Raises:
      ValueError: a file cannot be read, or an id is not a non-negative int.
    """
    path = Path(path)
    if (gguf_path := gguf.find(path)) is not None:
        file = gguf.read(gguf_path)
        keys = [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom")]
        values = {f"{gguf_path}: {key}": file.one(key) for key in keys}
    else:
        files = [path / name for name in ("generation_config.json", "config.json")]
        values = {f"{f}: eos_token_id": read_json(f).get("eos_token_id") for f in files if f.exists()}
    ids: list[int] = []
    for source, value in values.items():
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if invalid := [token for token in listed if type(token) is not int or not 0 <= token < 2**31]:
            raise ValueError(f"{source} must be one or more token ids, got {invalid[0]!r:.80}")
        ids += listed
    return tuple(dict.fromkeys(ids))


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory or GGUF file")


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    _check_directory(directory)
    path = directory / "tokenizer_config.json"
    return read_json(path, limit=MAX_LIST_BYTES) if path.exists() else {}


def read_tokenizer_json(directory: Path) -> "Tokenizer":
    """The tokenizer in `tokenizer.json`, with its padding and truncation.

    The child process of `untrusted` loads and tries it first: the library can panic, abort or exhaust memory.

    Raises:
      ValueError: the file is missing or damaged, or its tokenizer fails on a short text.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{directory} has no tokenizer.json; save the model with a fast tokenizer to create it"
        )
    source = read_text(path)
    if (digest := hashlib.sha256(source.encode()).digest()) not in _TRIED:
        run_job(f"{path} is not a valid tokenizer", "try_tokenizer", source=source)
        _TRIED.add(digest)
    return Tokenizer.from_str(source)


def _from_gguf(file: gguf.Gguf) -> "Tokenizer":
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


def _tokens(file: gguf.Gguf) -> list[str]:
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


def _numbers(file: gguf.Gguf, key: str, count: int) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, np.ndarray) or len(values) != count or not np.all(np.isfinite(values)):
        raise ValueError(f"{file.path}: tokenizer.ggml.{key} must be {count} numbers, one per token")
    return values.tolist()


def _token(file: gguf.Gguf, tokens: Sequence[str], number: Any) -> str:
    if type(number) is not int or not 0 <= number < len(tokens):
        raise ValueError(
            f"{file.path}: special token id {number!r:.80} is outside the vocabulary of {len(tokens)} tokens"
        )
    return tokens[number]


def _byte_level(file: gguf.Gguf, vocabulary: dict[str, int], kinds: list[int]) -> "Tokenizer":
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


def _sentencepiece(file: gguf.Gguf, vocabulary: dict[str, int], kinds: list[int]) -> "Tokenizer":
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


def _add_bos_eos(result: "Tokenizer", file: gguf.Gguf, tokens: Sequence[str]) -> None:
    """Makes the tokenizer add BOS and EOS as the file says, or else by llama.cpp's defaults."""
    from tokenizers import processors

    by_default = file.one("tokenizer.ggml.model") == "llama" or (
        _PRE_TOKENIZERS[file.one("tokenizer.ggml.pre", "default")] == _LLAMA3
    )
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
