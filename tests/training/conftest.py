"""The tiny worlds of whole runs, from which tests here train nothing."""

from ..integration.conftest import cache, cache_directory, first_talk, first_world, talk, world  # noqa: F401
