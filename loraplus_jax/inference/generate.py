"""`loraplus generate`: answers prompts with a tuned model or a base model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from .._utils.validation import check_int, check_number, expand_path
from ..adapter.tree import combine
from ..data.conversations import Chat, Turn, read_chats
from ..data.data_to_text import linearize, read_inputs
from ..data.fetch import resolve
from ..interop.peft_files import NOTES_FILE, peft_options
from ..models.checkpoints.hf import load_params
from ..models.decoding.generate import Sampling, check_sampling
from ..settings.schema import DataSettings, Dtype, GenerationSettings, ModelSettings, Settings
from ..step.sharding import make_mesh, replicate
from ..tasks.causal_lm import make_base
from ..tasks.chat_model import ChatModel
from ..tasks.language_losses import LanguageTask
from ..training.run_directory import describe_unfinished
from ..training.saved_adapter import find_adapter, is_peft, read_adapter, read_notes
from ..training.setup import build_model, load_model, params_of
from .predict import load_tuned, settings_with_adapter

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
) -> list[dict[str, str]]:
    """Generates an answer to each prompt, as `{"prompt": ..., "answer": ...}`.

    Args:
      place: a run, an adapter directory of either format, an exported merged model, or a value of `model.path`.
      prompts: user messages, or meaning representations for a run of task generation. Pass either these or `data`.
      data: a file of conversations; regenerates the last answer of each. For a run of task generation, a file with
        the column `mr`; equal ones are answered once.
      system: system message for each of `prompts`.
      max_tokens: maximum tokens per answer; by default 128, or for a run of task generation its
        `generation.max_new_tokens`.
      beams, length_penalty, no_repeat_ngram: see `make_beam_search`; by default those of a run of task generation,
        and otherwise one beam, which is greedy decoding, and n-grams of the answer alone. Not with a temperature
        above 0, which samples; `length_penalty` only with several beams.
      temperature, top_p: see `Sampling`.
      seed: seed for sampling; 0 by default.
      batch_size: conversations per batch.
      template, dtype: chat template and dtype of the weights, for a model or a PEFT adapter; a run has its own.
      config: a training config, for a PEFT adapter whose base model is not where the adapter says.
      allow_different: parts of the base model that may differ from what a run was trained on, see `PARTS`.

    Raises:
      ValueError, OSError: an argument is missing, out of range or without effect, or a file cannot be read.
    """
    if not prompts and data is None:
        raise ValueError("generate requires --prompt TEXT or --data FILE")
    if prompts and data is not None:
        raise ValueError(f"generate accepts --prompt or --data, not both; got --data {data}")
    if system is not None and data is not None:
        raise ValueError(
            "--system requires --prompt; conversations in --data contain their own system messages"
        )
    sampling = Sampling(temperature, top_p)
    check_sampling(sampling)
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, at_least=1)
    options: dict[str, Any] = {}
    if beams is not None:
        check_int("beams", beams, at_least=1)
        options["beams"] = beams
    if length_penalty is not None:
        check_number("length_penalty", length_penalty)
        options["length_penalty"] = length_penalty
    if no_repeat_ngram is not None:
        check_int("no_repeat_ngram", no_repeat_ngram, at_least=0)
        options["no_repeat_ngram"] = no_repeat_ngram
    if options and temperature > 0:
        raise ValueError(f"--{next(iter(options))} requires --temperature 0, got {temperature}")
    check_int("batch_size", batch_size, at_least=1)
    if temperature == 0 and (top_p != 1 or seed is not None):
        raise ValueError("--top_p and --seed require a --temperature above 0; 0 is greedy decoding")
    seed = 0 if seed is None else seed
    check_int("seed", seed, at_least=0)
    if any(not text.strip() for text in (*prompts, *([] if system is None else [system]))):
        raise ValueError("--prompt and --system must not be empty")
    settings, directory, task, model, variables = open_model(place, template, dtype, config, allow_different)
    chats = _chats(prompts, data, system, settings)
    is_generation = settings.task == "generation"
    default = settings.generation.max_new_tokens if is_generation else MAX_TOKENS
    search = None
    if temperature == 0 and is_generation:
        search = dataclasses.replace(settings.generation, **options)
    elif options:
        search = GenerationSettings(**{"beams": 1, **options})
    if length_penalty is not None and search is not None and search.beams == 1:
        raise ValueError(f"--length_penalty {length_penalty:g} requires --beams above 1, which it compares")
    chat_model = ChatModel.from_settings(settings, directory, task, model, max_tokens or default, search)
    variables = replicate(make_mesh(1), variables)
    answers = chat_model.answer(variables, chats, sampling=sampling, seed=seed, batch_size=batch_size)
    return [
        {"prompt": chat.turns[-1].text, "answer": text} for chat, text in zip(chats, answers, strict=True)
    ]


def _chats(prompts: Sequence[str], data: str | None, system: str | None, settings: Settings) -> list[Chat]:
    if settings.task == "generation":
        if data is not None:
            return [Chat((x.turn,)) for x in read_inputs(resolve(data, "data"), settings.data.column_names)]
        prompts = [linearize(text) for text in prompts]
    if data is not None:
        chats = read_chats(resolve(data, "data"), settings.data.column_names)
        if plain_texts := [chat.place for chat in chats if not chat.turns[:-1]]:
            raise ValueError(
                f"{plain_texts[0]}: plain text has no prompt to answer; pass --data with conversations"
            )
        # A conversation that does not end with an answer is answered where it ends.
        ends = [tuple(turn for turn in chat.dropped if turn.role != "system") for chat in chats]
        return [
            dataclasses.replace(chat, turns=(*chat.turns, *end) if end else chat.turns[:-1])
            for chat, end in zip(chats, ends, strict=True)
        ]
    system_turns = () if system is None else (Turn("system", system),)
    return [Chat((*system_turns, Turn("user", text))) for text in prompts]


def open_model(
    source: str, template: str | None, dtype: Dtype | None, config: str | None, allow_different: Sequence[str]
) -> tuple[Settings, Path, LanguageTask | None, Any, Any]:
    """Opens a language model: a run, an adapter, an exported merged model, or a model without adapters.

    Returns:
      Settings, directory or file of the base, task if any, model and variables.

    Raises:
      ValueError, OSError: it is none of these, or not a language model, or `template` or `dtype` is set for a run.
    """
    path = expand_path("model", source)
    directory = find_adapter(path)
    is_theirs = directory is not None and config is None and not read_notes(directory).get("settings")
    is_ours = not is_theirs and (directory is not None or (path / NOTES_FILE).is_file())
    if allow_different and not is_ours:
        raise ValueError(
            f"--allow_different {allow_different[0]} requires a run or merged model, got {source}"
        )
    if directory is not None and is_theirs:
        return _open_peft_adapter(directory, template, dtype)
    if is_ours:
        if template is not None or dtype is not None:
            raise ValueError("--template and --dtype apply to models and PEFT adapters; a run has its own")
        tuned = load_tuned(path, config, allow_different)
        if not tuned.settings.is_language:
            raise ValueError(
                f"{source} is an encoder for {tuned.settings.task}, not a language model; use loraplus predict"
            )
        variables = combine(tuned.parts.trainable, tuned.parts.frozen)
        return tuned.settings, tuned.base, tuned.task, tuned.parts.model, variables
    if config is not None:
        raise ValueError(f"--config requires a PEFT adapter, got {source}")
    if (unfinished := describe_unfinished(path)) is not None:
        raise FileNotFoundError(unfinished)
    directory, settings = resolve(source, "model"), _plain_settings(source, template, dtype)
    base = make_base(settings, directory, None)
    shapes = jax.eval_shape(base.model.init, jax.random.key(0), *base.inputs)["params"]
    return settings, directory, None, base.model, {"params": load_params(directory, base.table, shapes)}


def _open_peft_adapter(
    directory: Path, template: str | None, dtype: Dtype | None
) -> tuple[Settings, Path, LanguageTask | None, Any, Any]:
    """Same as `open_model`, for a PEFT adapter on the base model that it names."""
    if not is_peft(directory):
        raise ValueError(f"{directory} has no training settings; use a run or adapter from loraplus train")
    base_name = peft_options(directory).base_model
    if base_name is None:
        raise ValueError(
            f"{directory} does not name its base model; pass --config with a training config that sets "
            "model.path"
        )
    base = resolve(base_name, "model")
    settings = settings_with_adapter(directory, _plain_settings(base_name, template, dtype), base, None)
    parts = load_model(settings, base, build_model(settings, base, None, settings.applied))
    adapter = read_adapter(directory, parts, params_of(parts))
    variables = combine({"lora": adapter.lora}, adapter.extras, parts.frozen)
    return settings, base, None, parts.model, variables


def _plain_settings(model: str, template: str | None, dtype: Dtype | None) -> Settings:
    """Settings of a language model without a run; only the fields that build the model are used."""
    weights_dtype = dtype or "float32"
    return Settings(
        model=ModelSettings(path=model, dtype=weights_dtype, param_dtype=weights_dtype),
        data=DataSettings(train="-", max_length=2, template=template or "model"),
        task="instruction",
        output_dir="-",
    )
