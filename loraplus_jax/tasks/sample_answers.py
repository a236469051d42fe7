"""Answers of a language model to what users ask, by its chat template."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from ..data.chat import tokenize, tokenize_chats
from ..data.chat_template import ChatTemplate
from ..data.conversations import Chat, Turn
from ..models.generate import NONFINITE_LOGITS, PAD_AFTER_END, Generate, Sampling, make_generate, pad_left
from ..models.tokenizer import stop_ids
from ..multihost import gather_to_host
from ..settings.schema import Settings
from .causal_lm import model_config, tokenizer_and_template
from .language_losses import LanguageTask

GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model that answers conversations.

    Attributes:
      tokenizer, template: the model's.
      generate: see `make_generate`.
      longest: tokens of a prompt at most, so that prompt and answer do not exceed what the model takes.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    generate: Generate
    longest: int

    @classmethod
    def from_settings(
        cls, settings: Settings, directory: Path, task: LanguageTask | None, model: nn.Module, new_tokens: int
    ) -> "ChatModel":
        """For a language model of a directory or GGUF file, with adapters or without.

        Raises:
          ValueError: `new_tokens` leaves no room for a prompt, or nothing says where answers end.
        """
        config, (tokenizer, template) = (
            model_config(directory),
            tokenizer_and_template(settings, directory, task),
        )
        if new_tokens >= config.max_length:
            raise ValueError(
                f"answers of {new_tokens} tokens leave no room for a prompt: the model takes {config.max_length}"
            )
        stop = sorted({*stop_ids(directory), *end_of_turn_ids(tokenizer, template)})
        if not stop:
            raise ValueError(f"{directory} names no token that ends a text, and the chat template shows none")
        dtype = jnp.dtype(settings.model.dtype)
        generate = make_generate(model, config, new_tokens=new_tokens, stop=stop, dtype=dtype)
        return cls(tokenizer, template, generate, config.max_length - new_tokens)

    def encode(self, chats: Sequence[Sequence[Turn]]) -> list[list[int]]:
        """The tokens of conversations up to where an answer begins.

        Raises:
          ValueError: one is too long, or the template makes nothing of one.
        """
        texts = [self.template.render(turns, add_generation_prompt=True) for turns in chats]
        prompts = [encoding.ids for encoding in tokenize(texts, self.tokenizer)]
        if empty := [n for n, ids in enumerate(prompts, 1) if not ids]:
            raise ValueError(
                f"the chat template of {self.template.origin} makes no tokens of prompt {empty[0]} "
                f"of {len(prompts)}"
            )
        if too_long := [len(ids) for ids in prompts if len(ids) > self.longest]:
            number = next(i for i, ids in enumerate(prompts, 1) if len(ids) > self.longest)
            raise ValueError(
                f"prompt {number} of {len(prompts)} has {too_long[0]} tokens; with the longest answer asked for "
                f"the model takes {self.longest}: make it or the answer shorter"
            )
        return prompts

    def answer(
        self,
        variables: Any,
        chats: Sequence[Sequence[Turn]],
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        batch_size: int = 8,
    ) -> list[str]:
        """The answers, without special tokens. All batches have one shape, so that one program makes them.

        Draws of an answer depend on the seed and on which of the conversations it answers, not on the batches.
        """
        prompts = self.encode(chats)
        rows = min(batch_size, len(prompts))
        ids, segments = pad_left([*prompts, *([prompts[-1]] * (-len(prompts) % rows))])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(ids)))
        batches = [slice(at, at + rows) for at in range(0, len(ids), rows)]
        batch_tokens = [self.generate(variables, ids[at], segments[at], sampling, keys[at]) for at in batches]
        tokens = np.concatenate(gather_to_host(batch_tokens))[: len(prompts)]
        if np.any(tokens == NONFINITE_LOGITS):
            raise ValueError(
                "the model's scores are not finite: look at the weights and the dtype, and at training"
            )
        return [self.tokenizer.decode(row[row != PAD_AFTER_END].tolist()).strip() for row in tokens]


@dataclasses.dataclass(frozen=True)
class SamplePrompt:
    """One prompt, to be answered before and after training."""

    prompt: str
    speaker: ChatModel

    @classmethod
    def from_settings(
        cls, settings: Settings, directory: Path, task: LanguageTask, model: nn.Module
    ) -> "SamplePrompt":
        """That of `train.prompt`; one that is too long is a ValueError."""
        prompt, train = settings.train.prompt or "", settings.train
        speaker = ChatModel.from_settings(settings, directory, task, model, train.prompt_tokens)
        speaker.encode([(Turn("user", prompt),)])
        return cls(prompt, speaker)

    def ask(self, variables: Any) -> str:
        """What the model says, always taking the likeliest token."""
        return self.speaker.answer(variables, [(Turn("user", self.prompt),)])[0]


def end_of_turn_ids(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    """The token that ends an answer, as the template writes it and training teaches the model to say it.

    None where the template does not show where answers lie: such a one can answer, but not train.
    """
    chat = Chat((Turn("user", "a"), Turn("assistant", "b")))
    try:
        sequences = tokenize_chats([chat], tokenizer, template, 1 << 20)
    except ValueError:
        return ()
    return (int(sequences.ids[0][sequences.masks[0] > 0][-1]),)
