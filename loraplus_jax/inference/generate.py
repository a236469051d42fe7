"""`loraplus generate`: answers prompts with a tuned model or a base model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._utils.records import check_files
from .._utils.validation import check_int, check_number, expand_path
from ..data.conversations import Chat, Turn, read_chats
from ..data.data_to_text import linearize, read_inputs
from ..data.fetch import resolve
from ..interop.peft_files import NOTES_FILE, peft_notes, peft_options
from ..models.decoding.generate import Sampling, check_sampling
from ..models.files import open_files
from ..settings.schema import DataSettings, Dtype, GenerationSettings, ModelSettings, Settings
from ..tasks.causal_lm import LanguageTask
from ..tasks.chat_generation import ChatModel
from ..training.distributed import raise_together
from ..training.provenance import model_identity
from ..training.run_directory import describe_unfinished
from ..training.saved_adapter import find_adapter, is_peft, read_notes
from ..training.setup import base_parts, build_model
from .devices import MeshSizes, check_same_rows
from .predict import (
    NO_DATA,
    TunedModel,
    check_weights,
    load_tuned,
    load_weights,
    load_whole,
    settings_with_adapter,
)
from .several_adapters import (
    SeveralAdapters,
    open_adapters,
    read_adapter_column,
    slots_of,
    use_of,
)

MAX_TOKENS = 128
EVALUATED_TOKENS = 1024
"""Most tokens of a row in `loraplus eval --data` for an adapter that was trained elsewhere."""


def generate_answers(
    place: str,
    *,
    prompts: Sequence[str] = (),
    data: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    no_repeat_ngram: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 8,
    template: str | None = None,
    dtype: Dtype | None = None,
    config: str | None = None,
    allow_different: Sequence[str] = (),
    adapters: Sequence[str] = (),
    use: Sequence[str] = (),
    mesh: MeshSizes = None,
) -> list[dict[str, str]]:
    """Generates an answer to each prompt, as `{"prompt": ..., "answer": ...}`, with `adapters` also `"adapter"`.

    For the arguments see `loraplus generate --help`; `mesh` replaces sizes of a run's mesh. A model's `data` is -1.
    """
    sampling = Sampling(temperature, top_p)
    check_sampling(sampling)
    if length_penalty is not None:
        check_number("length_penalty", length_penalty)
    for name, value, least in (
        *(("max_tokens", max_tokens, 1), ("beams", beams, 1), ("no_repeat_ngram", no_repeat_ngram, 0)),
        *(("batch_size", batch_size, 1), ("seed", seed, 0)),
    ):
        if value is not None:
            check_int(name, value, at_least=least)
    passed = {"beams": beams, "length_penalty": length_penalty, "no_repeat_ngram": no_repeat_ngram}
    options: dict[str, Any] = {name: value for name, value in passed.items() if value is not None}
    if any(not text.strip() for text in (*prompts, *([] if system is None else [system]))):
        raise ValueError("--prompt and --system must not be empty")
    several = None
    if adapters:
        several = _open_several(place, adapters, template, dtype, allow_different, mesh)
        tuned = several.tuned
    else:
        tuned = open_model(place, template, dtype, config, allow_different, mesh)
    settings, model = tuned.settings, tuned.parts.model
    with raise_together():
        chats = _chats(prompts, data, system, settings, distinct=several is None)
        names: list[str] = []
        if several is not None and data is None:
            use = use_of(use, several)
            chats, names = [chat for chat in chats for _ in use], [*use] * len(chats)
        elif several is not None:
            names, locations = read_adapter_column(resolve(str(data), "data"))
            slots_of(names, several, locations)
        is_generation = settings.task == "generation"
        default = settings.generation.max_new_tokens if is_generation else MAX_TOKENS
        search = None
        if temperature == 0 and is_generation:
            search = dataclasses.replace(settings.generation, **options)
        elif options:
            search = GenerationSettings(**{"beams": 1, **options})
        if length_penalty is not None and search is not None and search.beams == 1:
            raise ValueError(
                f"--length_penalty {length_penalty:g} requires --beams above 1, which it compares"
            )
        new_tokens = max_tokens or default
        chat_model = ChatModel.from_settings(
            settings, tuned.base, tuned.task, model, new_tokens, search, tuned.mesh
        )
        encoded = chat_model.encode(chats)
    check_same_rows([*encoded, names])
    stack = None if several is None else (several.stack, [several.slots[name] for name in names])
    answers = chat_model.answer(
        tuned.variables, chats, sampling=sampling, seed=seed or 0, batch_size=batch_size, adapters=stack
    )
    named = [{"adapter": name} for name in names] or [{}] * len(chats)
    return [
        {"prompt": chat.turns[-1].text, **name, "answer": text}
        for chat, name, text in zip(chats, named, answers, strict=True)
    ]


def _open_several(
    source: str,
    adapters: Sequence[str],
    template: str | None,
    dtype: Dtype | None,
    allow_different: Sequence[str],
    mesh: MeshSizes,
) -> SeveralAdapters:
    is_run = find_adapter(expand_path("model", source)) is not None
    plain = None if is_run else _plain_settings(source, template, dtype)
    several = open_adapters(source, adapters, plain, allow_different, mesh)
    settings = several.tuned.settings
    if not settings.is_language:
        raise ValueError(
            f"{source} is an encoder for {settings.task}, not a language model; use loraplus predict"
        )
    if settings is not plain and (template is not None or dtype is not None):
        raise ValueError("--template and --dtype apply to models and PEFT adapters; a run has its own")
    return several


def _chats(
    prompts: Sequence[str], data: str | None, system: str | None, settings: Settings, *, distinct: bool
) -> list[Chat]:
    """What to answer; of data for task generation each input once if `distinct`."""
    if settings.task == "generation":
        if data is not None:
            file, columns = resolve(data, "data"), settings.data.column_names
            return [Chat((x.turn,)) for x in read_inputs(file, columns, distinct=distinct)]
        prompts = [linearize(text) for text in prompts]
    if data is not None:
        chats = read_chats(resolve(data, "data"), settings.data.column_names, to_train=False)
        if plain_texts := [chat.place for chat in chats if chat.turns[-1].role == "text"]:
            raise ValueError(
                f"{plain_texts[0]}: plain text has no prompt to answer; pass --data with conversations"
            )
        # A conversation that ends with an answer is answered at that place.
        is_answered = (chat.turns[-1].role == "assistant" for chat in chats)
        return [
            dataclasses.replace(chat, turns=chat.turns[:-1]) if answered else chat
            for chat, answered in zip(chats, is_answered, strict=True)
        ]
    system_turns = () if system is None else (Turn("system", system),)
    return [Chat((*system_turns, Turn("user", text))) for text in prompts]


def open_model(
    source: str,
    template: str | None,
    dtype: Dtype | None,
    config: str | None,
    allow_different: Sequence[str],
    mesh: MeshSizes = None,
) -> TunedModel:
    """Opens a language model: a run, an adapter, an exported merged model, or a model without adapters."""
    path = expand_path("model", source)
    with raise_together():
        directory = find_adapter(path)
        is_theirs = directory is not None and config is None and not read_notes(directory).get("settings")
        # A model that `loraplus convert` merged has digests only.
        is_ours = not is_theirs and (directory is not None or "settings" in (peft_notes(path) or {}))
        if allow_different and not is_ours:
            raise ValueError(
                f"--allow_different {allow_different[0]} requires a run or merged model, got {source}"
            )
        if is_ours and (template is not None or dtype is not None):
            raise ValueError("--template and --dtype apply to models and PEFT adapters; a run has its own")
        tuned = None if is_ours else _open_untuned(source, directory, template, dtype, config, mesh)
    if tuned is None:
        tuned = load_tuned(path, config, allow_different, mesh)
        if not tuned.settings.is_language:
            raise ValueError(
                f"{source} is an encoder for {tuned.settings.task}, not a language model; use loraplus predict"
            )
    else:
        check_weights(path, tuned)
    return tuned


def _open_untuned(
    source: str,
    directory: Path | None,
    template: str | None,
    dtype: Dtype | None,
    config: str | None,
    mesh: MeshSizes,
) -> TunedModel:
    """Opens a model without adapters, or an adapter that PEFT wrote, in `directory`."""
    if directory is None:
        if config is not None:
            raise ValueError(f"--config requires a PEFT adapter, got {source}")
        if (unfinished := describe_unfinished(expand_path("model", source))) is not None:
            raise FileNotFoundError(unfinished)
    elif not is_peft(directory):
        raise ValueError(f"{directory} has no training settings; use a run or adapter from loraplus train")
    else:
        return load_weights(directory, describe_peft(directory, template, dtype), mesh)
    base, settings = open_files(resolve(source, "model")), _plain_settings(source, template, dtype)
    check_files(base.path / NOTES_FILE, peft_notes(base.path) or {})
    parts = base_parts(settings, base, None)
    return load_whole(TunedModel(settings, None, parts, base), mesh)


def describe_peft(directory: Path, template: str | None = None, dtype: Dtype | None = None) -> TunedModel:
    """A language model with an adapter that PEFT wrote, on the base that it names, with shapes as variables.

    Raises:
      ValueError, OSError: the adapter names no base, or one that is no language model of this package.
    """
    name = peft_options(directory).base_model
    if name is None:
        raise ValueError(
            f"{directory} does not name its base model; pass --config with a training config that sets "
            "model.path"
        )
    base, settings = open_files(resolve(name, "model")), _plain_settings(name, template, dtype)
    settings = settings_with_adapter(directory, settings, base, None)
    return TunedModel(settings, None, build_model(settings, base, None, settings.applied), base)


def as_instruction_model(tuned: TunedModel) -> TunedModel:
    """The same with what `save_adapter` must know of a run for `generate`, `eval` and `export`."""
    task, model = LanguageTask(kind="instruction"), tuned.parts.base.model
    longest = min(EVALUATED_TOKENS, model.config.max_length)  # pyright: ignore[reportAttributeAccessIssue]
    data = dataclasses.replace(tuned.settings.data, max_length=longest)
    settings = dataclasses.replace(tuned.settings, data=data)
    return tuned._replace(settings=settings, task=task, identity=model_identity(settings, tuned.base, task))


def _plain_settings(model: str, template: str | None, dtype: Dtype | None) -> Settings:
    """Settings of a language model without a run; only the fields that build the model are used."""
    weights_dtype = dtype or "float32"
    return Settings(
        model=ModelSettings(path=model, dtype=weights_dtype, param_dtype=weights_dtype),
        data=DataSettings(train=NO_DATA, max_length=2, template=template or "model"),
        task="instruction",
        output_dir="-",
    )
