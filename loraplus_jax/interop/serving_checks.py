"""What a server that loads PEFT directories would reject or ignore, found before a directory is written.

From the documentation and sources of vLLM and SGLang; see docs/serving.md.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Server = Literal["vllm", "sglang"]

Rule = tuple[Callable[[Mapping[str, Any]], Any], str]
"""Returns the value of an option that the server does not support, or nothing; and what the server does with it."""


_SAME_SCALE = "{} is ignored: every layer gets the scale of r and lora_alpha"
_COMMON: tuple[Rule, ...] = (
    (lambda options: options["rank_pattern"], f"rank_pattern {_SAME_SCALE}"),
    (lambda options: options["alpha_pattern"], f"alpha_pattern {_SAME_SCALE}"),
    (lambda options: options.get("target_parameters"), "target_parameters {} is ignored"),
    (lambda options: options.get("use_dora"), "use_dora {} is not supported"),
    (lambda options: options["bias"] != "none" and options["bias"], "bias {!r} is not supported"),
)
SERVERS: Mapping[Server, Sequence[Rule]] = {
    "vllm": (
        *_COMMON,
        (lambda options: options["modules_to_save"], "modules_to_save {} is rejected"),
        (
            lambda o: rank if (rank := max(o["r"], 0, *o["rank_pattern"].values())) > 512 else None,
            "rank {} is above 512, the largest allowed",
        ),
    ),
    "sglang": (
        *_COMMON,
        (lambda options: options["modules_to_save"], "modules_to_save {} is not loaded"),
        (lambda options: options["use_rslora"], "use_rslora {} is ignored: the scale is wrong"),
    ),
}


def find_problems(server: Server, options: Mapping[str, Any]) -> list[str]:
    """One line per option of an `adapter_config.json` that a server does not treat as PEFT does.

    Example:
      >>> options = {"r": 8, "rank_pattern": {}, "alpha_pattern": {"q_proj": 4}, "bias": "none",
      ...            "modules_to_save": None, "use_rslora": False}
      >>> find_problems("vllm", options)
      ["alpha_pattern {'q_proj': 4} is ignored: every layer gets the scale of r and lora_alpha"]
    """
    return [text.format(value) for rule, text in SERVERS[server] if (value := rule(options))]
