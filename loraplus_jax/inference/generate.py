"""`loraplus generate`: answers to prompts, from a tuned model or from one as it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from .._validation import check_int
from ..data.conversations import Turn, read_chats
from ..data.fetch import resolve
from ..interop.peft_files import NOTES_FILE, peft_options
from ..models.generate import Sampling, check_sampling
from ..models.hf import load_params
from ..settings.schema import DataSettings, Dtype, ModelSettings, Settings
from ..sharding import make_mesh, replicate
from ..tasks.causal_lm import make_base
from ..tasks.language_losses import LanguageTask
from ..tasks.sample_answers import ChatModel
from ..training.init_adapter import find_adapter, is_peft, read_adapter, read_notes
from ..training.run_directory import ADAPTER, CHECKPOINTS
from ..training.setup import build_model, load_model, params_of
from ..tree import combine
from .predict import load_tuned, settings_with_adapter


def generate_answers(
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
    config: str | None = None,
) -> list[dict[str, str]]:
    """Answers, each with its prompt.

    Args:
      place: a run's output directory or an adapter directory of either format; or a model as `model.path` names it.
      prompts: what the user says. Either this or `data`.
      data: a file of conversations, whose last answers are left out and made anew.
      system: what stands before each of `prompts`.
      max_tokens: tokens of an answer at most.
      temperature, top_p: see `Sampling`.
      seed: of draws, 0 if not given.
      batch_size: conversations answered at once.
      template, dtype: for a model or an adapter that PEFT made, the chat template and what the base's weights are
        kept in; a run has its own.
      config: of a training run, for an adapter that PEFT made whose base is not where it says.

    Raises:
      ValueError, OSError: something is missing, out of range, or cannot be read.
    """
    if bool(prompts) == (data is not None):
        raise ValueError("generate needs --prompt or --data, one of the two")
    if system is not None and data is not None:
        raise ValueError("--system goes with --prompt; conversations of --data have their own")
    sampling = Sampling(temperature, top_p)
    check_sampling(sampling)
    check_int("max_tokens", max_tokens, at_least=1)
    check_int("batch_size", batch_size, at_least=1)
    if temperature == 0 and (top_p != 1 or seed is not None):
        raise ValueError("--top_p and --seed go with a --temperature above 0: at 0 nothing is drawn")
    seed = 0 if seed is None else seed
    check_int("seed", seed, at_least=0)
    if any(not text.strip() for text in (*prompts, *([] if system is None else [system]))):
        raise ValueError("a prompt or the system text is empty")
    settings, directory, task, model, variables = _open_model(place, template, dtype, config)
    chats = _chats(prompts, data, system, settings)
    speaker = ChatModel.from_settings(settings, directory, task, model, max_tokens)
    variables = replicate(make_mesh(1), variables)
    answers = speaker.answer(variables, chats, sampling=sampling, seed=seed, batch_size=batch_size)
    return [{"prompt": turns[-1].text, "answer": text} for turns, text in zip(chats, answers, strict=True)]


def _chats(
    prompts: Sequence[str], data: str | None, system: str | None, settings: Settings
) -> list[tuple[Turn, ...]]:
    if data is not None:
        chats = read_chats(resolve(data, "data"), settings.data.column_names)
        if unanswered := [chat.place for chat in chats if not chat.turns[:-1]]:
            raise ValueError(f"{unanswered[0]}: a text asks nothing; generate answers conversations")
        return [chat.turns[:-1] for chat in chats]
    before = () if system is None else (Turn("system", system),)
    return [(*before, Turn("user", text)) for text in prompts]


def _open_model(
    place: str, template: str | None, dtype: Dtype | None, config: str | None
) -> tuple[Settings, Path, LanguageTask | None, Any, Any]:
    """Settings, base, task, model and variables of a run, of an adapter, or of a model without adapters."""
    path = Path(place).expanduser()
    directory = find_adapter(path)
    if directory is not None and config is None and not read_notes(directory).get("settings"):
        return _open_peft_adapter(directory, template, dtype)
    if directory is not None or (path / NOTES_FILE).is_file():
        if template is not None or dtype is not None:
            raise ValueError(
                "--template and --dtype are for models; a run answers with those that it was trained with"
            )
        tuned = load_tuned(path, config)
        if not tuned.settings.is_language:
            raise ValueError(f"{place} holds an encoder for {tuned.settings.task}: use predict")
        variables = combine(tuned.parts.trainable, tuned.parts.frozen)
        return tuned.settings, tuned.base, tuned.task, tuned.parts.model, variables
    if config is not None:
        raise ValueError(f"--config is for adapters that PEFT made; {place} is none")
    if (path / CHECKPOINTS).is_dir():
        raise ValueError(f"the run in {place} is not finished: it has no {ADAPTER}/ yet")
    directory, settings = resolve(place, "model"), _plain_settings(place, template, dtype)
    base = make_base(settings, directory, None)
    shapes = jax.eval_shape(base.model.init, jax.random.key(0), *base.inputs)["params"]
    return settings, directory, None, base.model, {"params": load_params(directory, base.table, shapes)}


def _open_peft_adapter(
    directory: Path, template: str | None, dtype: Dtype | None
) -> tuple[Settings, Path, LanguageTask | None, Any, Any]:
    """The same of an adapter that PEFT made, on the base that it names."""
    if not is_peft(directory):
        raise ValueError(f"{directory} was not written by loraplus train: its settings are not in it")
    base_name = peft_options(directory).base_model
    if base_name is None:
        raise ValueError(
            f"{directory} does not name its base model: give the config of a run with --config, in which "
            "model.path does"
        )
    base = resolve(base_name, "model")
    settings = settings_with_adapter(directory, _plain_settings(base_name, template, dtype), base, None)
    parts = load_model(settings, base, build_model(settings, base, None, settings.applied), settings.applied)
    adapter = read_adapter(directory, parts, params_of(parts))
    variables = combine({"lora": adapter.lora}, adapter.extras, parts.frozen)
    return settings, base, None, parts.model, variables


def _plain_settings(model: str, template: str | None, dtype: Dtype | None) -> Settings:
    """Settings of a language model without a run; only the fields that build the model matter."""
    weights_dtype = dtype or "float32"
    return Settings(
        model=ModelSettings(path=model, dtype=weights_dtype, param_dtype=weights_dtype),
        data=DataSettings(train="-", max_length=2, template=template or "model"),
        task="instruction",
        output_dir="-",
    )
