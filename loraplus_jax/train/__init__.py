"""The application: one command from a directory of weights to a tuned, evaluated adapter."""
