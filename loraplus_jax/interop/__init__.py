"""Adapter files, in our format and PEFT's, and adapters of other JAX libraries."""
