"""A setting that a sweep tries, and the arm of the comparison that it belongs to."""

from typing import Literal, NamedTuple

ArmName = Literal["lora", "lora_plus", "control"]
METHODS = ("lora", "lora_plus")
ARM_LABELS: dict[str, str] = {"lora": "LoRA", "lora_plus": "LoRA+", "control": "LoRA(alpha x lambda)"}
"""Display names of the arms."""


class Trial(NamedTuple):
    """One setting of the search.

    Attributes:
      learning_rate: peak eta_A.
      lr_ratio: lambda.
      alpha: LoRA alpha.
      rank: LoRA rank.
    """

    learning_rate: float
    lr_ratio: float
    alpha: float
    rank: int

    @property
    def arm(self) -> ArmName:
        """The method it belongs to: plain LoRA if lr_ratio is 1, else LoRA+."""
        return "lora" if self.lr_ratio == 1.0 else "lora_plus"

    @property
    def control(self) -> "Trial":
        """Plain LoRA with alpha x lambda: in theory equivalent under Adam without weight decay and clipping."""
        return self._replace(lr_ratio=1.0, alpha=self.alpha * self.lr_ratio)

    def __str__(self) -> str:
        ratio = "" if self.lr_ratio == 1.0 else f", lambda {self.lr_ratio:g}"
        return f"eta_A {self.learning_rate:g}{ratio}, alpha {self.alpha:g}, rank {self.rank}"
