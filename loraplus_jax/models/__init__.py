"""Reference models. They know nothing of LoRA: adapters arrive through `apply_lora_plus`."""
