"""A model's files, opened once and handed on: what a Hugging Face directory and a GGUF file both have."""

import abc
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_IMAGE_TOKEN = "<image_soft_token>"  # of Gemma 3


class View(Protocol):
    """A tensor in a file, of which only the rows that are asked for are read, as of safetensors' slices."""

    supported: ClassVar[Sequence[str]]
    """The types that can be read in such a file."""

    def get_shape(self) -> list[int]:
        """The shape, rows first."""
        ...

    def get_dtype(self) -> str:
        """The file format's name of the type."""
        ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


class ModelFiles(abc.ABC):
    """The files of a model, from `open_files`: each is opened when something in it is first asked for, and kept.

    Attributes:
      path: the path that was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`, or the same from a GGUF file's metadata.

        Raises:
          ValueError: it is missing, not a JSON object or, of a GGUF file, unsupported.
        """
        return self._read_config()

    @property
    def tensors(self) -> Mapping[str, View]:
        """Lazy views of the weights, by Hugging Face's names.

        Raises:
          ValueError: a file is missing, damaged or a pickle; the index names a file outside the directory.
          ImportError: safetensors, or for a GGUF file gguf, is not installed.
        """
        return self._weights[0]

    @property
    def index_problems(self) -> list[str]:
        """One line for each tensor that the index of the weights has another place for than the files."""
        return self._weights[1]

    @cached_property
    def _weights(self) -> tuple[Mapping[str, View], list[str]]:
        return self._read_weights()

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, without padding and truncation, which nobody may set: all share it.

        Raises:
          ValueError: it is missing, damaged or of an unknown kind, or has more tokens than the model's
            embedding has rows.
          ImportError: tokenizers, or for a GGUF file gguf, is not installed.
        """
        try:
            import tokenizers  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError(
                "reading a tokenizer needs tokenizers: pip install 'loraplus_jax[train]'"
            ) from error
        result, rows = self._read_tokenizer()
        if type(rows) is int:
            result = _without_image_token(result, rows)
            check_ids(result, self.path, rows)
        return result

    @cached_property
    def plain_tokenizer(self) -> "Tokenizer":
        """The tokenizer without its post-processor, for exact offsets: those of byte-level ones trim spaces."""
        copy = self.new_tokenizer()
        copy.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        return copy

    def new_tokenizer(self) -> "Tokenizer":
        """A copy of the tokenizer, to change.

        Raises:
          ValueError: as for `tokenizer`, or its merges name tokens that its vocabulary lacks.
        """
        tokenizer = self.tokenizer
        try:
            return type(tokenizer).from_str(tokenizer.to_str())
        except Exception as error:  # the library has no class of its own
            raise ValueError(f"{self.path}: the tokenizer is damaged: {error}") from None

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja chat template, the default one if there are several; None if there is none.

        Raises:
          ValueError: a file cannot be read.
        """
        source, template = self._read_chat_template()
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{source}: the chat template must be a string, got {template!r:.80}")
        return template

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The texts of `bos_token`, `eos_token`, `pad_token` and `unk_token`, as far as the model defines them.

        Raises:
          ValueError: a file cannot be read, or a special token is not in the vocabulary.
        """
        return self._read_special_tokens()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text according to the files: end-of-text and, if known, end-of-turn.

        Raises:
          ValueError: a file cannot be read, or an id is not a non-negative int.
        """
        ids: list[int] = []
        for source, value in self._read_stop_ids().items():
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if invalid := [token for token in listed if type(token) is not int or not 0 <= token < 2**31]:
                raise ValueError(f"{source} must be one or more token ids, got {invalid[0]!r:.80}")
            ids += listed
        return tuple(dict.fromkeys(ids))

    @abc.abstractmethod
    def copy_tokenizer(self, target: Path) -> None:
        """Writes the tokenizer's files for transformers into a directory, without local paths."""

    @abc.abstractmethod
    def _read_config(self) -> dict[str, Any]:
        """See `config`."""

    @abc.abstractmethod
    def _read_weights(self) -> tuple[Mapping[str, View], list[str]]:
        """See `tensors` and `index_problems`."""

    @abc.abstractmethod
    def _read_tokenizer(self) -> tuple["Tokenizer", Any]:
        """The tokenizer as `tokenizer` describes it, and the rows of the embedding, an int if they are known."""

    @abc.abstractmethod
    def _read_chat_template(self) -> tuple[Path, Any]:
        """The file for messages, and what it has as its template."""

    @abc.abstractmethod
    def _read_special_tokens(self) -> dict[str, str]:
        """See `special_tokens`."""

    @abc.abstractmethod
    def _read_stop_ids(self) -> dict[str, Any]:
        """Ids, lists of ids or None, by their place in the files."""


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
