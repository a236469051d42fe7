"""A Hugging Face directory: `config.json`, safetensors files and the files of a tokenizer."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ml_dtypes
import numpy as np

from ..._utils.atomic import to_json
from ..._utils.json_files import (
    MAX_LIST_BYTES,
    MAX_TOKENIZER_BYTES,
    check_file,
    is_plain_name,
    read_json,
    read_text,
)
from ..._utils.untrusted import run_job
from .model_files import ModelFiles, View

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
"""The files of a tokenizer and of generation's defaults that are copied."""
_PLACES = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
"""Fields that say where the files were on someone's machine; nothing reads them."""
_VOCABULARY = re.compile(rb"\n[\x02-\x7f]\n[\x00-\x7d]|[A-Za-z0-9+/]+=* [0-9]+\n")
"""How a .model file begins: SentencePiece's with the message of a piece, tiktoken's with a token in base64."""
_tried: set[bytes] = set()
"""Digests of valid tokenizers: a sweep opens the model once per unit."""
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class HubDirectory(ModelFiles):
    """A directory as transformers saves it."""

    def _read_config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @property
    def _known_config(self) -> dict[str, Any]:
        # A directory with a tokenizer alone has none.
        return self.config if (self.path / "config.json").exists() else {}

    def _read_weights(self) -> tuple[Mapping[str, View], list[str]]:
        tensors: dict[str, SafetensorsView] = {}
        problems: list[str] = []
        weight_map = _weight_map(self.path)
        absent = sorted({name for name in weight_map.values() if not os.path.isfile(self.path / name)})
        if len(absent) > 1:
            raise ValueError(f"{self.path}: files in the index are missing: {', '.join(absent)}")
        for file_name in sorted(set(weight_map.values())) or [SINGLE_FILE]:
            file = _open(self.path / file_name)
            # In the order of names, as the order of a file's keys is the library's.
            names = sorted(file.opened.keys())
            listed = {tensor for tensor, owner in weight_map.items() if owner == file_name}
            missing = sorted(listed.difference(names))
            problems += [f"- {name} (the index lists it in {file_name}, which lacks it)" for name in missing]
            for name in names:
                if name in tensors:
                    problems.append(f"+ {name} (a second tensor of this name, in {file_name})")
                else:
                    tensors[name] = SafetensorsView(file, name, file.opened.get_slice(name))
        return tensors, problems

    def _read_tokenizer(self) -> tuple["Tokenizer", Any]:
        return self._tokenizer_json, self._known_config.get("vocab_size")

    @cached_property
    def _tokenizer_json(self) -> "Tokenizer":
        """The tokenizer in `tokenizer.json`.

        The child process of `untrusted` loads and tries it first: the library can panic, abort or exhaust memory.
        """
        from tokenizers import Tokenizer

        path = self.path / "tokenizer.json"
        if not path.exists():
            raise ValueError(
                f"{self.path} has no tokenizer.json; save the model with a fast tokenizer to create it"
            )
        source = read_text(path, limit=MAX_TOKENIZER_BYTES)
        digest = hashlib.sha256(source.encode()).digest()
        if digest not in _tried:
            run_job(f"{path} is not a valid tokenizer", "try_tokenizer", source=source)
            _tried.add(digest)
        result = Tokenizer.from_str(source)
        result.no_padding()
        result.no_truncation()
        return result

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        path = self.path / "tokenizer_config.json"
        return read_json(path, limit=MAX_LIST_BYTES) if path.exists() else {}

    def _read_chat_template(self) -> tuple[Path, Any]:
        if (jinja := self.path / "chat_template.jinja").exists():
            return jinja, read_text(jinja)
        template = self._tokenizer_config.get("chat_template")
        if isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        return self.path / "tokenizer_config.json", template

    def _read_special_tokens(self) -> dict[str, str]:
        # If the tokenizer's config does not mention one, as GPT-2's, its id in the model's decides.
        settings, config = self._tokenizer_config, self._known_config
        values = {role: settings.get(role) for role in _ROLES}
        texts = {role: t.get("content") if isinstance(t, dict) else t for role, t in values.items()}
        unnamed = {
            role: config.get(f"{role}_id") for role in ("bos_token", "eos_token") if role not in settings
        }
        numbers = {role: n for role, n in unnamed.items() if type(n) is int and 0 <= n < 2**31}
        if numbers and (self.path / "tokenizer.json").exists():
            texts |= {role: self._tokenizer_json.id_to_token(n) for role, n in numbers.items()}
        return {role: text for role, text in texts.items() if isinstance(text, str)}

    def _read_stop_ids(self) -> dict[str, Any]:
        generation = self.path / "generation_config.json"
        contents = {generation: read_json(generation)} if generation.exists() else {}
        contents[self.path / "config.json"] = self._known_config
        return {f"{file}: eos_token_id": content.get("eos_token_id") for file, content in contents.items()}

    def copy_tokenizer(self, target: Path) -> None:
        """See `ModelFiles.copy_tokenizer`."""
        for name in TOKENIZER_FILES:
            source = self.path / name
            if not source.exists():
                continue
            check_file(source)
            if name in ("tokenizer_config.json", "generation_config.json"):
                write_json(target / name, without_places(read_json(source, limit=MAX_LIST_BYTES)))
                continue
            # Unless it is what its name says, it may be a file of the user that must not get into an export.
            if name == "tokenizer.json":
                _ = self._tokenizer_json
            elif source.suffix == ".json":
                read_json(source, limit=MAX_LIST_BYTES)
            elif source.suffix != ".model":
                read_text(source)
            else:
                with source.open("rb") as file:
                    if not _VOCABULARY.match(file.read(512)):
                        raise ValueError(f"{source} is not a SentencePiece or tiktoken vocabulary")
            shutil.copyfile(source, target / name)


def without_places(content: Any) -> Any:
    """The content of a JSON file without the fields that say where the files were on someone's machine."""
    if not isinstance(content, Mapping):
        return content
    return {name: without_places(value) for name, value in content.items() if name not in _PLACES}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as transformers does."""
    path.write_text(to_json(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to shard, from the index; empty for a single file."""
    if (directory / SINGLE_FILE).exists():
        return {}
    if not (directory / INDEX_FILE).exists():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{directory} has its weights only in {pickles[0]}, a pickle, which can run arbitrary code; "
                "convert it in a sandbox: "
                "transformers.AutoModel.from_pretrained(d).save_pretrained(d, safe_serialization=True)"
            )
        raise ValueError(f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(directory / INDEX_FILE, limit=MAX_LIST_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{directory / INDEX_FILE} must have a weight_map from tensor names to files, "
            f"got {weight_map!r:.80}"
        )
    for file_name in weight_map.values():
        if not is_plain_name(file_name) or not file_name.endswith(".safetensors"):
            raise ValueError(
                f"{directory / INDEX_FILE}: files must be plain .safetensors names in the same directory, "
                f"got {file_name!r}"
            )
    return weight_map


def _open(path: Path) -> "_SafetensorsFile":
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise ImportError("reading weights needs safetensors: pip install 'loraplus_jax[train]'") from error
    # Path.exists raises for a name that is too long for the file system.
    if not os.path.exists(path):
        raise ValueError(f"{path} is missing, but the index lists it")
    check_file(path)
    try:
        opened = safetensors.safe_open(path, framework="np")
        # At once, so that a file that replaces it is not read by this header.
        return _SafetensorsFile(opened, np.memmap(path, np.uint8, "r").view(np.ndarray))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file: {error}; "
            "download it again (truncated, or a Git LFS pointer?)"
        ) from error


@dataclass(frozen=True)
class _SafetensorsFile:
    """A file that safetensors has opened and checked, and mapped."""

    opened: Any
    mapped: np.ndarray

    @cached_property
    def header_and_data(self) -> tuple[dict[str, Any], np.ndarray]:
        """The JSON header, and the mapped bytes that its offsets refer to."""
        start = 8 + int.from_bytes(self.mapped[:8].tobytes(), "little")
        return json.loads(self.mapped[8:start].tobytes()), self.mapped[start:]


@dataclass(frozen=True)
class SafetensorsView:
    """A lazy tensor: floats are read-only views of the mapped file, where safetensors makes copies."""

    file: _SafetensorsFile
    name: str
    slice: Any
    supported: ClassVar[Sequence[str]] = tuple(_FLOATS)

    def get_shape(self) -> list[int]:
        """See `View`."""
        return self.slice.get_shape()

    def get_dtype(self) -> str:
        """See `View`."""
        return self.slice.get_dtype()

    def __getitem__(self, index: Any) -> np.ndarray:
        if (dtype := _FLOATS.get(self.get_dtype())) is None:
            return self.slice[index]
        header, data = self.file.header_and_data
        start, stop = header[self.name]["data_offsets"]
        return data[start:stop].view(dtype).reshape(self.get_shape())[index]
