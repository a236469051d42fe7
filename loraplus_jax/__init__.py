"""LoRA+ for JAX and Flax: low-rank adapters whose output factor B learns lambda times faster than A.

The method is from Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024,
arXiv 2402.12354. Five lines adapt any Flax Linen model with LoRA+:

    config = LoRAPlusConfig(target_modules=["query", "value"], lr_ratio=4.0)
    model = apply_lora_plus(model, config)
    lora, specs = init_lora(model, key, inputs)
    tx = lora_plus_adamw(1e-4, lr_ratio=config)
    outputs = model.apply({"params": params, "lora": lora}, inputs)
"""

from .checkpoint import open_manager as open_manager
from .checkpoint import restore_checkpoint as restore_checkpoint
from .checkpoint import save_checkpoint as save_checkpoint
from .config import LoRAPlusConfig as LoRAPlusConfig
from .interop.adapter_files import load_adapter as load_adapter
from .interop.adapter_files import save_adapter as save_adapter
from .interop.peft_files import load_peft as load_peft
from .interop.peft_files import save_peft as save_peft
from .linen.layers import LoRAPlusConv as LoRAPlusConv
from .linen.layers import LoRAPlusDense as LoRAPlusDense
from .linen.layers import LoRAPlusDenseGeneral as LoRAPlusDenseGeneral
from .linen.layers import LoRAPlusEinsum as LoRAPlusEinsum
from .linen.layers import LoRAPlusEmbed as LoRAPlusEmbed
from .linen.layers import LoRAPlusMultiHeadDotProductAttention as LoRAPlusMultiHeadDotProductAttention
from .linen.wrap import apply_lora_plus as apply_lora_plus
from .linen.wrap import init_lora as init_lora
from .lora import disabled as disabled
from .lora import merge as merge
from .lora import unmerge as unmerge
from .optim.diagnostics import describe as describe
from .optim.diagnostics import probe as probe
from .optim.lora_plus import lora_plus as lora_plus
from .optim.lora_plus import lora_plus_adamw as lora_plus_adamw
from .optim.schedules import make_schedule as make_schedule
from .roles import label_params as label_params
from .sharding import distribute as distribute
from .sharding import make_mesh as make_mesh
from .sharding import make_shardings as make_shardings
from .train_step import TrainState as TrainState
from .train_step import init_state as init_state
from .train_step import jit_step as jit_step
from .train_step import make_eval as make_eval
from .train_step import pmap_step as pmap_step
from .tree import combine as combine
from .tree import split_trainable as split_trainable
