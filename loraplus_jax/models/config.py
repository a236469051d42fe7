"""What the configs of all families share: reading a `config.json`, and checks that list every problem."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

from .._utils.validation import check_choice
from .activations import ACTIVATIONS


class ModelConfig:
    """Base class of the configs, which are frozen dataclasses with the field names of Hugging Face's `config.json`.

    Attributes:
      MODEL_TYPES: the family's values of `model_type`.
      ACTIVATION: the field that names an activation function.
      BOUNDS: number fields, with the numbers that they are above and below.
      RATES: number fields from 0 to below 1.
      NAMES: the file's names of fields, where they differ.
    """

    MODEL_TYPES: ClassVar[tuple[str, ...]]
    ACTIVATION: ClassVar[str] = "hidden_act"
    BOUNDS: ClassVar[Mapping[str, tuple[float, float]]] = {}
    RATES: ClassVar[tuple[str, ...]] = ()
    NAMES: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the fields that it needs from the contents of a `config.json`.

        Raises:
          ValueError: the model type or an option is unsupported, or a size is missing or invalid.

        Example:
          >>> from loraplus_jax.models.gpt2.config import GPT2Config
          >>> sizes = dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=64, n_inner=None)
          >>> config = GPT2Config.from_hf({"model_type": "gpt2", **sizes})
          >>> config.hidden_size, config.intermediate_size, config.max_length
          (8, 32, 64)
        """
        try:
            check_choice("model_type", config.get("model_type"), cls.MODEL_TYPES)
            return cls(**cls.read(config))
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"config.json: {error}") from None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the fields in a `config.json` of one of the `MODEL_TYPES`."""
        raise NotImplementedError

    @classmethod
    def select(
        cls,
        entries: Mapping[str, Any],
        only: Mapping[str, Sequence[Any]],
        *,
        optional: Collection[str] = (),
        problems: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The values of the fields among a file's options.

        Args:
          entries: the file's options.
          only: the supported values of options that change what the model computes, the default first.
          optional: fields without a default that the file may lack.
          problems: other problems.

        Raises:
          ValueError: an option has another value, or a field is missing; lists all problems.
        """
        fields: Any = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        unsupported = [
            f"{key} is {entries[key]!r}, only {known[0]!r} is supported"
            for key, known in only.items()
            if entries.get(key, known[0]) not in known
        ]
        missing = [
            f"{cls.NAMES.get(field.name, field.name)} is missing"
            for field in fields
            if field.default is dataclasses.MISSING and field.name not in (*entries, *optional)
        ]
        if faults := [*unsupported, *missing, *problems]:
            raise ValueError("; ".join(faults))
        return {field.name: entries[field.name] for field in fields if field.name in entries}

    def __post_init__(self) -> None:
        if problems := self._field_problems() or self.size_problems():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def size_problems(self) -> list[str]:
        """One line per pair of sizes that do not fit; called once all fields are valid."""
        heads, width = (getattr(self, name) for name in ("num_attention_heads", "hidden_size"))
        names = [self.NAMES.get(name, name) for name in ("num_attention_heads", "hidden_size")]
        return [f"{' must divide '.join(names)}, got {heads} and {width}"] if width % heads else []

    def _field_problems(self) -> list[str]:
        """One line per invalid field, by its type: an int is a size of at least 1."""
        choices = {"model_type": self.MODEL_TYPES, self.ACTIVATION: tuple(ACTIVATIONS)}
        problems = []
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            name, value = field.name, getattr(self, field.name)
            number: Any = value
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            low, high = self.BOUNDS.get(name, (0.0, 1.0))
            allowed = None
            if value is None and field.default is None:
                continue
            if name in choices and value not in choices[name]:
                allowed = f"one of {', '.join(choices[name])}"
            elif name in self.BOUNDS and not (is_number and low < number < high):
                allowed = f"a number above {low:g} and below {high:g}"
            elif name in self.RATES and not (is_number and 0 <= number < 1):
                allowed = "a number in [0, 1)"
            elif field.type in (int, int | None):
                least = int(name != "pad_token_id")
                allowed = None if type(value) is int and value >= least else f"an int of at least {least}"
            elif field.type is bool and not isinstance(value, bool):
                allowed = "true or false"
            if allowed:
                problems.append(f"{self.NAMES.get(name, name)} must be {allowed}, got {value!r:.80}")
        return problems
