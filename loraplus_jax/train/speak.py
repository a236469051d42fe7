"""`loraplus generate`: answers to prompts, from a tuned model or from one as it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..config import check_whole
from ..models.generate import Sampling, check_sampling
from ..models.hf import load_params
from ..sharding import make_mesh, replicate
from ..tree import combine
from .answers import Speaker
from .conversations import Turn, read_chats
from .data import DataSettings
from .fetch import resolve
from .language import make_base
from .language_tasks import LanguageTask
from .lifecycle import ADAPTER
from .loop import CHECKPOINTS
from .settings import Dtype, ModelSettings, Settings
from .use import NOTES, load_tuned


def speak(
    place: str,
    *,
    prompts: Sequence[str] = (),
    data: str | None = None,
    system: str | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
    template: str | None = None,
    dtype: Dtype | None = None,
) -> list[dict[str, str]]:
    """Answers, each with its prompt.

    Args:
      place: a run's output directory or an adapter directory; or a model as `model.path` names it.
      prompts: what the user says. Either this or `data`.
      data: a file of conversations, whose last answers are left out and made anew.
      system: what stands before each of `prompts`.
      max_tokens: tokens of an answer at most.
      temperature, top_p: see `Sampling`.
      seed: of draws, 0 if not given.
      batch_size: conversations answered at once.
      template, dtype: for a model, its chat template and what its weights are kept in; a run has its own.

    Raises:
      ValueError, OSError: something is missing, out of range, or cannot be read.
    """
    if bool(prompts) == (data is not None):
        raise ValueError("generate needs --prompt or --data, one of the two")
    if system is not None and data is not None:
        raise ValueError("--system goes with --prompt; conversations of --data have their own")
    sampling = Sampling(temperature, top_p)
    check_sampling(sampling)
    check_whole("max_tokens", max_tokens, at_least=1)
    check_whole("batch_size", batch_size, at_least=1)
    if temperature == 0 and (top_p != 1 or seed is not None):
        raise ValueError("--top_p and --seed go with a --temperature above 0: at 0 nothing is drawn")
    seed = 0 if seed is None else seed
    check_whole("seed", seed, at_least=0)
    _check_prompts(prompts, system)
    settings, directory, task, model, variables = _opened(place, template, dtype)
    chats = _chats(prompts, data, system, settings)
    speaker = Speaker.from_settings(settings, directory, task, model, max_tokens)
    variables = replicate(make_mesh(1), variables)
    answers = speaker.answer(variables, chats, sampling=sampling, seed=seed, batch_size=batch_size)
    return [{"prompt": turns[-1].text, "answer": text} for turns, text in zip(chats, answers, strict=True)]


def _check_prompts(prompts: Sequence[str], system: str | None) -> None:
    if any(not text.strip() for text in (*prompts, *([] if system is None else [system]))):
        raise ValueError("a prompt or the system text is empty")


def _chats(
    prompts: Sequence[str], data: str | None, system: str | None, settings: Settings
) -> list[tuple[Turn, ...]]:
    if data is not None:
        chats = read_chats(resolve(data, "data"), settings.data.column_names)
        if odd := [chat.place for chat in chats if not chat.turns[:-1]]:
            raise ValueError(f"{odd[0]}: a text asks nothing; generate answers conversations")
        return [chat.turns[:-1] for chat in chats]
    before = () if system is None else (Turn("system", system),)
    return [(*before, Turn("user", text)) for text in prompts]


def _opened(
    place: str, template: str | None, dtype: Dtype | None
) -> tuple[Settings, Path, LanguageTask | None, Any, Any]:
    """Settings, base, task, model and variables of a run, or of a model without adapters."""
    path = Path(place).expanduser()
    if (path / ADAPTER).is_dir() or (path / NOTES).is_file():
        if template is not None or dtype is not None:
            raise ValueError(
                "--template and --dtype are for models; a run answers with those that it was trained with"
            )
        tuned = load_tuned(path)
        if not tuned.settings.is_language:
            raise ValueError(f"{place} holds an encoder for {tuned.settings.task}: use predict")
        variables = combine(tuned.parts.trainable, tuned.parts.frozen)
        return tuned.settings, tuned.base, tuned.task, tuned.parts.model, variables
    if (path / CHECKPOINTS).is_dir():
        raise ValueError(f"the run in {place} is not finished: it has no {ADAPTER}/ yet")
    directory, kept = resolve(place, "model"), dtype or "float32"
    # Only what a language model is made from counts here; nothing is read or written.
    settings = Settings(
        model=ModelSettings(path=place, dtype=kept, param_dtype=kept),
        data=DataSettings(train="-", max_length=2, template=template or "model"),
        task="instruction",
        output_dir="-",
    )
    base = make_base(settings, directory, None)
    shapes = jax.eval_shape(base.model.init, jax.random.key(0), *base.inputs)["params"]
    return settings, directory, None, base.model, {"params": load_params(directory, base.table, shapes)}
