"""Generates answers to prompts with a language model and its chat template."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from .._utils.multihost import gather_to_host
from ..adapter.adapter_stack import AdapterStack
from ..data.batches import round_up
from ..data.chat_template import ChatTemplate
from ..data.chat_tokens import end_of_turn, tokenize
from ..data.conversations import Chat, Turn
from ..data.data_to_text import linearize
from ..models.checkpoints.model_files import ModelFiles
from ..models.decoding.beam_search import make_beam_search
from ..models.decoding.generate import (
    NONFINITE_LOGITS,
    PAD_AFTER_END,
    Generate,
    Sampling,
    make_generate,
    pad_left,
)
from ..step.sharding import batch_parts
from .causal_lm import LanguageTask, model_config, tokenizer_and_template
from .options import GenerationOptions, TaskOptions

GREEDY = Sampling()
LIMITS = "generation.max_new_tokens, train.prompt_tokens or --max_tokens"
"""What sets the maximum tokens of an answer: for held-out texts, for `train.prompt`, and in `generate`."""


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model that answers conversations.

    Attributes:
      tokenizer, template: the model's tokenizer and chat template.
      generate: the generation function, see `make_generate`; a beam search ignores sampling and keys.
      longest: maximum prompt tokens, so that prompt and answer fit the model's context.
      parts: number of parts of a batch, by the devices of a mesh that hold them.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    generate: Generate
    longest: int
    parts: int = 1

    @classmethod
    def from_options(
        cls,
        options: TaskOptions,
        files: ModelFiles,
        task: LanguageTask | None,
        model: nn.Module,
        new_tokens: int,
        search: GenerationOptions | None = None,
        mesh: Mesh | None = None,
    ) -> "ChatModel":
        """Creates a chat model from `model` and its files; with `search` it has beams.

        `mesh` is that of the variables, by default a single device.
        """
        config = model_config(files)
        tokenizer, template = tokenizer_and_template(options, files, task)
        if new_tokens >= config.max_length:
            raise ValueError(
                f"answers of {new_tokens} tokens leave no room for a prompt: the model's limit for both is "
                f"{config.max_length}; lower {LIMITS}"
            )
        stop = set(files.stop_ids)
        if (end := end_of_turn(tokenizer, template)) is not None:
            stop.add(end[0])
        if not stop:
            raise ValueError(
                f"{files} has no eos_token_id, and the chat template does not show how answers end: "
                "set eos_token_id or use another template"
            )
        shared: Any = {
            "new_tokens": new_tokens,
            "stop": sorted(stop),
            "dtype": jnp.dtype(options.model.dtype),
        }
        shared["mesh"] = mesh
        longest, parts = config.max_length - new_tokens, 1 if mesh is None else batch_parts(mesh)
        if search is None:
            return cls(tokenizer, template, make_generate(model, config, **shared), longest, parts)
        try:
            beam_search = make_beam_search(
                model,
                config,
                beams=search.beams,
                length_penalty=search.length_penalty,
                no_repeat_ngram=search.no_repeat_ngram,
                no_repeat_in=search.no_repeat_in,
                early_stopping=search.early_stopping,
                **shared,
            )
        except ValueError as error:
            prefix = "generation." if search is options.generation else "--"
            raise ValueError(f"{prefix}{error}") from None

        def generate(
            variables: Any, ids: Any, segments: Any, _: Any, __: Any, adapters: Any = None
        ) -> jax.Array:
            return beam_search(variables, ids, segments, adapters)[0]

        return cls(tokenizer, template, generate, longest, parts)

    def encode(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Tokenizes conversations up to the start of the answer; raises ValueError if one is too long or empty."""
        calls = [([(chat.turns, True)], chat.tools, chat.place) for chat in chats]
        texts = [text for ((text, _),) in self.template.render_chats(calls)]
        prompts = [encoding.ids for encoding in tokenize(texts, self.tokenizer)]
        for number, ids in enumerate(prompts, 1):
            prompt = f"prompt {number} of {len(prompts)}"
            if not ids:
                raise ValueError(f"{prompt} has no tokens after the chat template of {self.template.origin}")
            if len(ids) > self.longest:
                raise ValueError(
                    f"{prompt} has {len(ids)} tokens, but the answer leaves room for {self.longest}: shorten "
                    f"the prompt, or lower {LIMITS}"
                )
        return prompts

    def answer(
        self,
        variables: Any,
        chats: Sequence[Chat],
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        batch_size: int = 8,
        between: Callable[[], None] = lambda: None,
        adapters: tuple[AdapterStack, Sequence[int]] | None = None,
    ) -> list[str]:
        """Generates the answers, without special tokens; `between` is called before each batch and may raise.

        With `adapters`, each conversation has the adapter in its slot of the stack. A batch has at most
        `batch_size` conversations, rounded up to a multiple of the mesh's parts.
        """
        prompts = self.encode(chats)
        rows = round_up(min(batch_size, len(prompts)), self.parts)
        # All batches of one shape: to compile a program for another takes longer than to compute padding.
        ids, segments = pad_left([*prompts, *([prompts[-1]] * (-len(prompts) % rows))])
        slots = None if adapters is None else np.resize(np.array(adapters[1], np.int32), len(ids))
        # A key for each conversation, so that samples do not depend on the batches.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(ids)))
        batch_tokens = []
        for start in range(0, len(ids), rows):
            between()
            batch = slice(start, start + rows)
            own = () if adapters is None or slots is None else ((adapters[0], slots[batch]),)
            tokens = self.generate(variables, ids[batch], segments[batch], sampling, keys[batch], *own)
            batch_tokens.append(gather_to_host(tokens))
        tokens = np.concatenate(batch_tokens)[: len(prompts)]
        if np.any(tokens == NONFINITE_LOGITS):
            raise ValueError(
                "the model's logits are not finite: check the weights, the dtype and the training loss"
            )
        return [self.tokenizer.decode(row[row != PAD_AFTER_END].tolist()).strip() for row in tokens]


def prompt_chat(prompt: str, task: str) -> Chat:
    """Returns the conversation of `train.prompt`; for task generation that of a meaning representation."""
    try:
        return Chat((Turn("user", linearize(prompt) if task == "generation" else prompt),))
    except ValueError as error:
        raise ValueError(f"train.prompt: {error}") from None
