"""The tiny worlds of whole runs, whose models and data are read."""

from ..integration.conftest import cache, cache_directory, first_talk, first_world, world  # noqa: F401
