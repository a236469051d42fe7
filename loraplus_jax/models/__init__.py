"""Reference models, without LoRA code: `apply_lora_plus` adds the adapters."""
