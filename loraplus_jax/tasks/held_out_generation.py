"""Generates texts for held-out inputs and scores them against their references."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from ..data.conversations import Chat
from ..data.data_to_text import Input
from ..models.checkpoints.model_files import ModelFiles
from .causal_lm import LanguageTask
from .chat_generation import ChatModel
from .options import TaskOptions
from .text_scores import load_scorers, score_texts


@dataclasses.dataclass(frozen=True)
class HeldOutTexts:
    """Inputs with references, and a model that generates texts for them by beam search."""

    inputs: tuple[Input, ...]
    model: ChatModel
    batch_size: int

    @classmethod
    def from_options(
        cls,
        options: TaskOptions,
        files: ModelFiles,
        task: LanguageTask,
        model: nn.Module,
        inputs: Sequence[Input],
        mesh: Mesh | None = None,
    ) -> "HeldOutTexts":
        """Creates the beam search that `generation` describes; `mesh` as in `ChatModel.from_options`."""
        search = options.generation
        load_scorers()
        chat_model = ChatModel.from_options(options, files, task, model, search.max_new_tokens, search, mesh)
        chat_model.encode([Chat((x.turn,)) for x in inputs])
        return cls(tuple(inputs), chat_model, search.batch_size)

    def generate(
        self, variables: Any, between: Callable[[], None] = lambda: None
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Returns a row `{"mr", "text", "references"}` for every input, and the scores of all texts."""
        chats = [Chat((x.turn,)) for x in self.inputs]
        texts = self.model.answer(variables, chats, batch_size=self.batch_size, between=between)
        rows = [
            {"mr": x.mr, "text": text, "references": list(x.references)}
            for x, text in zip(self.inputs, texts, strict=True)
        ]
        return rows, score_texts(texts, [x.references for x in self.inputs])
