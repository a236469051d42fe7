"""A GGUF file as the files of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub_directory import write_json
from ..model_files import ModelFiles, View
from .header import read
from .load import config, embedding_rows, views
from .vocabulary import make_tokenizer, special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class GgufFile(ModelFiles):
    """A GGUF file.

    Args:
      path: the path that was opened: the file, or the directory that it is in.
      file: the file.

    Attributes:
      header: its metadata and the places of its tensors.
    """

    def __init__(self, path: Path, file: Path) -> None:
        super().__init__(path)
        self.header = read(file)

    def _read_config(self) -> dict[str, Any]:
        return config(self.header)

    def _read_weights(self) -> tuple[Mapping[str, View], list[str]]:
        return views(self.header), []

    def _read_tokenizer(self) -> tuple["Tokenizer", Any]:
        return make_tokenizer(self.header), embedding_rows(self.header)

    def _read_chat_template(self) -> tuple[Path, Any]:
        return self.header.path, self.header.one("tokenizer.chat_template")

    def _read_special_tokens(self) -> dict[str, str]:
        return special_tokens(self.header)

    def _read_stop_ids(self) -> dict[str, Any]:
        keys = [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom")]
        return {f"{self.header.path}: {key}": self.header.one(key) for key in keys}

    def copy_tokenizer(self, target: Path) -> None:
        """See `ModelFiles.copy_tokenizer`."""
        (target / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_json(target / "tokenizer_config.json", settings)
        if self.stop_ids:
            write_json(target / "generation_config.json", {"eos_token_id": list(self.stop_ids)})
