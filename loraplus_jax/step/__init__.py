"""A training loop of one's own: steps, losses, shardings, checkpoints, the terms of LoRA+'s theory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
