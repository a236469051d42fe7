"""A training loop of one's own: steps, losses, shardings, checkpoints, the terms of LoRA+'s theory."""

from .checkpoint import DamagedCheckpoint as DamagedCheckpoint
from .checkpoint import Restored as Restored
from .checkpoint import open_manager as open_manager
from .checkpoint import restore_checkpoint as restore_checkpoint
from .checkpoint import save_checkpoint as save_checkpoint
from .fingerprints import fingerprint as fingerprint
from .losses import chunked_cross_entropy as chunked_cross_entropy
from .population import population_step as population_step
from .run_metadata import describe_run as describe_run
from .sharding import constrain_rows as constrain_rows
from .sharding import distribute as distribute
from .sharding import local_rows as local_rows
from .sharding import make_mesh as make_mesh
from .sharding import make_shardings as make_shardings
from .sharding import replicate as replicate
from .sharding import shard_batch as shard_batch
from .theory import balance as balance
from .theory import make_theory as make_theory
from .theory import terms_by_layer as terms_by_layer
from .train_step import TrainState as TrainState
from .train_step import init_state as init_state
from .train_step import jit_step as jit_step
from .train_step import make_eval as make_eval
from .train_step import make_step as make_step
from .train_step import pmap_step as pmap_step
