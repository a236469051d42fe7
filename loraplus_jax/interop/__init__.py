"""Adapters from and for other libraries: our files, PEFT's files, path maps, other libraries' trees."""
