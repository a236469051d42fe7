"""Settings of a run: the schema, and parsing from YAML files and the command line."""
