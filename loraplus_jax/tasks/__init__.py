"""Tasks: model head, loss, metrics and sampled answers."""
