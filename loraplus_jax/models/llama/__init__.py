"""Llama and models of its kind: Mistral, Qwen, Gemma, Phi-3."""
