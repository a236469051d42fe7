"""What these tests compare with, by the extra `interop`; `.ci/run` fails unless all three can be imported."""

import importlib.util

PACKAGES = ("torch", "peft", "transformers")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, PACKAGES)) else ["*.py"]
