"""`loraplus generate`: answers prompts with a tuned model or a base model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .._utils.validation import check_int, check_number
from ..data.conversations import Chat, Turn, read_chats
from ..data.data_to_text import linearize, read_inputs
from ..data.fetch import resolve
from ..models.decoding.generate import Sampling, check_sampling
from ..models.options import Dtype
from ..settings.schema import Settings
from ..tasks.chat_generation import ChatModel
from ..tasks.options import GenerationOptions
from ..training.distributed import raise_together
from .devices import MeshSizes, check_same_rows, choose_mesh
from .several_adapters import (
    SeveralAdapters,
    describe_adapters,
    load_adapters,
    read_adapter_column,
    slots_of,
    use_of,
)
from .tuned_model import check_language, describe_language, load, look_model

MAX_TOKENS = 128


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
    several: SeveralAdapters | None = None
    with raise_together():
        if adapters:
            several = describe_adapters(place, adapters, allow_different, template=template, dtype=dtype)
            described = check_language(several.tuned)
        else:
            described = describe_language(
                look_model(place), config, allow_different, template=template, dtype=dtype
            )
        settings = described.settings
        on = choose_mesh(settings.mesh, mesh)
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
            search = GenerationOptions(**{"beams": 1, **options})
        if length_penalty is not None and search is not None and search.beams == 1:
            raise ValueError(
                f"--length_penalty {length_penalty:g} requires --beams above 1, which it compares"
            )
        new_tokens = max_tokens or default

        def make_chat_model(model: Any) -> ChatModel:
            return ChatModel.from_options(
                settings.task_options, described.base, described.task, model, new_tokens, search, on
            )

        chat_model = make_chat_model(described.parts.model)
        encoded = chat_model.encode(chats)
    check_same_rows([*encoded, names])
    if several is None:
        tuned, stack = load(described, on), None
    else:
        tuned, values = load_adapters(several, on)
        stack = values, [several.slots[name] for name in names]
        chat_model = make_chat_model(tuned.parts.model)  # the base with the adapters of the stack
    answers = chat_model.answer(
        tuned.variables, chats, sampling=sampling, seed=seed or 0, batch_size=batch_size, adapters=stack
    )
    named = [{"adapter": name} for name in names] or [{}] * len(chats)
    return [
        {"prompt": chat.turns[-1].text, **name, "answer": text}
        for chat, name, text in zip(chats, named, answers, strict=True)
    ]


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
