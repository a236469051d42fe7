"""What these tests compare with, by the extra `interop`; `.ci/run` fails unless all three can be imported.

llama.cpp's package is compiled for so long at its installation that `.ci/run` does without its tests.
"""

import importlib.util

PACKAGES = ("torch", "peft", "transformers")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, PACKAGES)) else ["*.py"]
collect_ignore = [] if importlib.util.find_spec("llama_cpp") else ["test_llama_cpp.py"]
