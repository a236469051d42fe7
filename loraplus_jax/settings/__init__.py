"""The settings of a run: their schema and how they are parsed from YAML and the command line."""
