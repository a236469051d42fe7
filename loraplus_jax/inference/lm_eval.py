"""A run or model as a model of lm-eval, EleutherAI's evaluation harness, for any of its tasks.

Requires the package lm_eval (extra `lm-eval`). `loraplus eval --tasks` needs neither.
"""

import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from .._utils.validation import check_int
from ..data.batches import round_up
from ..data.chat_template import ChatTemplate
from ..data.chat_tokens import end_of_turn
from ..data.conversations import Turn
from ..models.decoding.generate import (
    NONFINITE_LOGITS,
    Generate,
    Sampling,
    check_sampling,
    make_generate,
    pad_left,
)
from ..models.options import Dtype
from ..step.sharding import batch_parts
from ..tasks.causal_lm import model_config, tokenizer_and_template
from .devices import MeshSizes, choose_mesh
from .scoring import Continuation, Scorer
from .tuned_model import describe_language, load, look_model

LOGGER = logging.getLogger(__name__)
GENERATION_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


class LoRAPlusLM(TemplateLM):
    """A language model for `lm_eval.simple_evaluate(model=LoRAPlusLM("runs/chat"), tasks=[...])`.

    Texts are tokenized with the special tokens that the tokenizer itself adds, as lm-eval does with models of
    transformers. A text that does not fit the model's context loses its beginning, which the log counts.

    Args:
      place: a run, an adapter directory of either format, an exported merged model, or a value of `model.path`.
      batch_size: texts per batch; rounded up to a multiple of the mesh's data-parallel parts.
      max_gen_toks: maximum tokens to generate, for tasks that do not set it.
      template, dtype: chat template and dtype of the weights, for a model or a PEFT adapter; a run has its own.
      config: a training config, for a PEFT adapter whose base model is not where the adapter says.
      allow_different: parts of the base model that may differ, see `loraplus eval --help`.
      mesh: sizes that replace those of the run's mesh; a model has `data` -1.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        template: str | None = None,
        dtype: Dtype | None = None,
        config: str | None = None,
        allow_different: Sequence[str] = (),
        mesh: MeshSizes = None,
    ) -> None:
        super().__init__()
        check_int("batch_size", batch_size, at_least=1)
        check_int("max_gen_toks", max_gen_toks, at_least=1)
        described = describe_language(
            look_model(str(place)), config, allow_different, template=template, dtype=dtype
        )
        self._tuned = load(described, choose_mesh(described.settings.mesh, mesh))
        self._base, self._model, self._mesh = self._tuned.base, self._tuned.parts.model, self._tuned.mesh
        self._variables, self._config = self._tuned.variables, model_config(self._base)
        self.max_length = self._config.max_length
        self.batch_size = round_up(batch_size, batch_parts(self._mesh))
        self.max_gen_toks = max_gen_toks
        self._tokenizer, self._place = self._base.tokenizer, str(place)
        self._special = self._base.special_tokens
        # A program for each number of new tokens and set of stop tokens, which are constants in it.
        self._program = functools.cache(self._make_program)
        self._score = Scorer(
            self._model,
            self._variables,
            mesh=self._mesh,
            batch_size=batch_size,
            max_length=self.max_length,
        )

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        if ids := self._base.stop_ids:
            return ids[0]
        raise ValueError(f"{self._base} has no eos_token_id: set it in config.json")

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context: BOS, or else the end of a text."""
        bos = self._tokenizer.token_to_id(self._special.get("bos_token", ""))
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name for lm-eval's cache of requests."""
        return self._place.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the text of the chat template, for lm-eval's log."""
        return self._template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders messages; without a generation prompt, the last one is the start of an answer."""
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        if add_generation_prompt:
            return self._template.render(turns, add_generation_prompt=True)
        return self._template.render(turns[:-1], add_generation_prompt=True) + turns[-1].text

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return tokenizer_and_template(self._tuned.settings.task_options, self._base, self._tuned.task)[1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenizes a text; by default with special tokens, unless it starts with BOS."""
        if add_special_tokens is None:
            bos = self._special.get("bos_token")
            add_special_tokens = not (bos and string.startswith(bos))
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        continuations, truncated = [], 0
        for _text, context, answer in requests:
            if not 1 <= len(answer) <= self.max_length:
                raise ValueError(
                    f"a continuation must have 1 to {self.max_length} tokens (the model's context), "
                    f"got {len(answer)}"
                )
            context = context or [self.prefix_token_id]
            # One more than the context: the last token is only predicted.
            ids = [*context, *answer][-(self.max_length + 1) :]
            truncated += len(ids) < len(context) + len(answer)
            continuations.append(Continuation(ids, len(ids) - len(answer)))
        _log_truncated(truncated, len(requests))
        results = [(score, greedy) for score, greedy in self._score(continuations)]
        for (text, _context, _answer), result in zip(requests, results, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows of the model's context."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens(list(itertools.chain.from_iterable(windows))))
        return [sum(score for score, _ in itertools.islice(scores, len(part))) for part in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each prompt, up to its stop strings or the end of the text."""
        options = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        groups: dict[str, list[int]] = {}
        for n, some in enumerate(options):
            groups.setdefault(repr(sorted(some.items(), key=str)), []).append(n)
        answers: dict[int, str] = {}
        for members in groups.values():
            prompts = [requests[n].args[0] for n in members]
            answers |= zip(members, self._generate(prompts, options[members[0]]), strict=True)
        for n, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[n])
        return [answers[n] for n in range(len(requests))]

    def _generate(self, prompts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """Generates answers with the same options; sorts the prompts, so that batches have few shapes."""
        if unknown := [name for name in options if name not in GENERATION_OPTIONS]:
            raise ValueError(
                f"generation option {unknown[0]} is not supported; allowed: {', '.join(GENERATION_OPTIONS)}"
            )
        new_tokens, until = options["max_gen_toks"], [text for text in options["until"] if text]
        sampling = Sampling(options.get("temperature", 0.0), options.get("top_p", 1.0))
        check_sampling(sampling)
        longest = self.max_length - new_tokens
        if longest < 1:
            raise ValueError(
                f"max_gen_toks {new_tokens} leaves no room for a prompt in the model's context of {self.max_length}"
            )
        encoded = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]
        _log_truncated(sum(len(ids) > longest for ids in encoded), len(prompts))
        encoded = [ids[-longest:] for ids in encoded]
        # A stop string of one token ends the generation at once; others are searched in the text below.
        ends = [ids for text in until if len(ids := self.tok_encode(text, add_special_tokens=False)) == 1]
        stop = {*self._base.stop_ids, *(ids[0] for ids in ends)}
        # Once lm-eval has rendered the prompts by the chat template, answers end as in `loraplus generate`.
        if "_template" in vars(self):
            end = end_of_turn(self._base.plain_tokenizer, self._template)
            stop |= set() if end is None else {end[0]}
        generate = self._program(new_tokens, tuple(sorted(stop)))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(len(prompts)))
        # The longest first: if memory runs out, then at the start.
        order = sorted(range(len(prompts)), key=lambda n: -len(encoded[n]))
        answers: dict[int, str] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            padded = np.array([*batch, *[batch[-1]] * (self.batch_size - len(batch))])
            ids, segments = pad_left([encoded[n] for n in padded])
            tokens = np.asarray(generate(self._variables, ids, segments, sampling, keys[padded]))
            if np.any(tokens == NONFINITE_LOGITS):
                raise ValueError("the model's logits are not finite: check the weights and the dtype")
            for n, row in zip(batch, tokens, strict=False):
                text = self._tokenizer.decode(row[row >= 0].tolist())
                answers[n] = postprocess_generated_text(text, stop=until, think_end_token=None)
        return [answers[n] for n in range(len(prompts))]

    def _make_program(self, new_tokens: int, stop: tuple[int, ...]) -> Generate:
        dtype = jnp.dtype(self._tuned.settings.model.dtype)
        return make_generate(
            self._model, self._config, new_tokens=new_tokens, stop=stop, dtype=dtype, mesh=self._mesh
        )


def _log_truncated(count: int, total: int) -> None:
    if count:
        LOGGER.warning("%d of %d texts were truncated at the start to the model's context", count, total)
