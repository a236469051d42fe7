"""What this suite compares with; `.ci/run` installs the extra `interop` and fails if nothing is collected then."""

import importlib.util

PACKAGES = ("torch", "peft", "transformers")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, PACKAGES)) else ["*.py"]
