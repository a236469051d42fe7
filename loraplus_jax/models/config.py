"""What the configs of all families share: types of their numbers, and reading a `config.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, ConfigDict, Field, Strict, ValidationError

from .._utils.validation import MOST_PROBLEMS, check_choice
from .activations import ACTIVATIONS

MAX_LAYERS, MAX_SIZE = 1_000, 2**24
_SAID = {"missing": "is missing", "unexpected_keyword_argument": "is not supported"}

# Files of others may state any number, so each has bounds: a model of these sizes is traced before the weights are
# compared with it. Strict: otherwise pydantic accepts true as 1 and "2" as 2.
Size = Annotated[int, Strict(), Field(ge=1, le=MAX_SIZE)]
HeadSize = Annotated[int, Strict(), Field(ge=1, le=2**14)]
"""Of a head, whose rotary frequencies are computed while the model is traced."""
Layers = Annotated[int, Strict(), Field(ge=1, le=MAX_LAYERS)]
Positions = Annotated[int, Strict(), Field(ge=1, le=2**27)]
"""The longest sequence of a model without a table of positions."""
Switch = Annotated[bool, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(ge=1e-9, lt=1e9)]
Epsilon = Annotated[Number, Field(gt=0, lt=1)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Deviation = Annotated[Number, Field(gt=0, lt=1e3)]


def _check_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"must be one of {', '.join(ACTIVATIONS)}")
    return name


Activation = Annotated[str, AfterValidator(_check_activation)]
CONFIG = ConfigDict(extra="forbid")
"""The pydantic configuration of every config: another field is an error."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is the same in all language models of a `model_type`: a row of a family's table `KINDS`.

    Attributes:
      architecture: transformers' class.
      fused: whether a layer computes several projections at once, which `split_fused` splits.
      gguf: the architecture in GGUF files; None if llama.cpp has none that is supported here.
      gguf_names: Hugging Face's name of each tensor in a GGUF file, of those in a layer without prefix and number.
      layers: what precedes the number of a layer in Hugging Face's names.
      interleaved: whether a GGUF file interleaves the two halves of each head of queries and keys.
      transposed: tensors of a layer whose matrices a GGUF file has transposed.
      norm_offset: what is added to the scales of norms, which a GGUF file contains.
    """

    architecture: str
    fused: bool = False
    gguf: str | None = None
    gguf_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers: str = "model.layers"
    interleaved: bool = False
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0


class ModelConfig:
    """Base class of the configs, which are pydantic dataclasses with the field names of `config.json`.

    Attributes:
      MODEL_TYPES: the family's values of `model_type`.
      NAMES: the file's names of fields, where they differ.
    """

    MODEL_TYPES: ClassVar[tuple[str, ...]]
    NAMES: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        # Called once all fields are valid.
        names = ("num_attention_heads", "hidden_size")
        heads, width = (getattr(self, name) for name in names)
        if width % heads:
            first, second = (self.NAMES.get(name, name) for name in names)
            raise ValueError(f"{first} must divide {second}, got {heads} and {width}")

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """Sizes that the mesh's tensor axis must divide. The vocabulary is not one: it may stay replicated."""
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        return {name: size for name, size in vars(self).items() if name in names}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the fields that it needs from the contents of a `config.json`.

        Raises:
          ValueError: the model type or an option is unsupported, or a size is missing or invalid; lists all,
            the first 20 of more.

        Example:
          >>> from loraplus_jax.models.gpt2.config import GPT2Config
          >>> sizes = dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=64, n_inner=None)
          >>> config = GPT2Config.from_hf({"model_type": "gpt2", **sizes})
          >>> config.hidden_size, config.intermediate_size, config.max_length
          (8, 32, 64)
        """
        try:
            check_choice("model_type", config.get("model_type"), cls.MODEL_TYPES)
        except (ValueError, TypeError) as error:
            raise ValueError(f"config.json: {error}") from None
        values, problems = cls.read(config)
        names = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        made = None
        try:
            made = cls(**{name: value for name, value in values.items() if name in names})
        except ValidationError as error:
            problems = [*problems, *map(cls._describe, error.errors())]
        if made is None or problems:
            left = len(problems) - MOST_PROBLEMS
            more = [f"and {left} more"] if left > 0 else []
            raise ValueError("config.json: " + "; ".join([*problems[:MOST_PROBLEMS], *more]))
        return made

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Values by the fields' names, besides others, and one line for each unsupported option."""
        raise NotImplementedError

    @classmethod
    def _describe(cls, error: Any) -> str:
        """A problem that pydantic found, as one line."""
        first, *rest = error["loc"] or ("",)
        name = ".".join(map(str, (cls.NAMES.get(first, first), *rest)))
        if (said := _SAID.get(error["type"])) is not None:
            return f"{name} {said}"
        message = error["msg"].removeprefix("Value error, ")
        # Of several fields, whose names and values the message has.
        return f"{name}: {message}, got {error['input']!r:.80}" if name else message


def unsupported(options: Mapping[str, Any], only: Mapping[str, Sequence[Any]]) -> list[str]:
    """One line for each option with a value that is not supported; `only` has those that are, the default first."""
    return [
        f"{name} is {options[name]!r:.80}, only {known[0]!r} is supported"
        for name, known in only.items()
        if options.get(name, known[0]) not in known
    ]
