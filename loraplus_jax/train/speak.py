"""`loraplus generate`: answers to prompts, from a tuned model or from one as it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..config import check_whole
from ..models.generate import Sampling, check_sampling
from ..sharding import make_mesh, replicate
from ..tree import combine
from .answers import Speaker
from .conversations import Turn, read_chats
from .data import DataSettings
from .fetch import resolve
from .lifecycle import ADAPTER
from .prepare import build, load
from .settings import ModelSettings, Settings
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
    seed: int = 0,
    batch_size: int = 8,
    template: str | None = None,
) -> list[dict[str, str]]:
    """Answers, each with its prompt.

    Args:
      place: a run's output directory or an adapter directory; or a model as `model.path` names it.
      prompts: what the user says. Either this or `data`.
      data: a file of conversations, whose last answers are left out and made anew.
      system: what stands before each of `prompts`.
      max_tokens: tokens of an answer at most.
      temperature, top_p: see `Sampling`.
      seed: of draws.
      batch_size: conversations answered at once.
      template: the chat template, for a model; a run has its own.

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
    check_whole("seed", seed, at_least=0)
    chats = _chats(prompts, data, system)
    settings, directory, model, variables = _opened(place, template)
    speaker = Speaker.from_settings(settings, directory, model, max_tokens)
    variables = replicate(make_mesh(1), variables)
    answers = speaker.answer(variables, chats, sampling=sampling, seed=seed, batch_size=batch_size)
    return [{"prompt": turns[-1].text, "answer": text} for turns, text in zip(chats, answers, strict=True)]


def _chats(prompts: Sequence[str], data: str | None, system: str | None) -> list[tuple[Turn, ...]]:
    if data is not None:
        return [chat.turns[:-1] for chat in read_chats(resolve(data, "data"))]
    if any(not text.strip() for text in (*prompts, *([] if system is None else [system]))):
        raise ValueError("a prompt or the system text is empty")
    before = () if system is None else (Turn("system", system),)
    return [(*before, Turn("user", text)) for text in prompts]


def _opened(place: str, template: str | None) -> tuple[Settings, Path, Any, Any]:
    """Settings, base, model and variables of a run, or of a model without adapters."""
    path = Path(place).expanduser()
    if (path / ADAPTER).is_dir() or (path / NOTES).is_file():
        if template is not None:
            raise ValueError(
                "--template is for models; a run answers with the template that it was trained with"
            )
        tuned = load_tuned(path)
        if not tuned.settings.is_language:
            raise ValueError(f"{place} holds an encoder for {tuned.settings.task}: use predict")
        return (
            tuned.settings,
            tuned.base,
            tuned.parts.model,
            combine(tuned.parts.trainable, tuned.parts.frozen),
        )
    directory = resolve(place, "model")
    # Only what a language model is made from counts here; nothing is read or written.
    settings = Settings(
        model=ModelSettings(path=place),
        data=DataSettings(train="-", max_length=2, template=template or "model"),
        task="instruction",
        method="full",
        output_dir="-",
    )
    parts = load(settings, directory, build(settings, directory, None, None), None)
    return settings, directory, parts.base.model, jax.tree.map(jax.numpy.asarray, parts.trainable)
