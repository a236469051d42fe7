"""Tools that know nothing of LoRA."""
