"""The choices of options that models check too; without pydantic, which is slow to import."""

from typing import Literal

Attention = Literal["auto", "xla", "blocked", "splash", "cudnn"]
Quantize = Literal["none", "int8", "nf4", "file"]
Remat = Literal["none", "dots", "full"]
EarlyStopping = Literal["heuristic", "complete", "never"]
NoRepeatIn = Literal["all", "new"]
MOST_PENALTY = 5
"""Largest length penalty, of either sign: a long sequence's score stays within float32."""
