"""Adapter files, PEFT's files and path maps."""

from .adapter_directory import Adapter as Adapter
from .adapter_directory import load_adapter as load_adapter
from .adapter_directory import save_adapter as save_adapter
from .combination import combine_adapters as combine_adapters
from .library_path_maps import BONSAI_GEMMA3 as BONSAI_GEMMA3
from .library_path_maps import BONSAI_QWEN3 as BONSAI_QWEN3
from .library_path_maps import BONSAI_VIT as BONSAI_VIT
from .library_path_maps import GEMMA as GEMMA
from .library_path_maps import TUNIX_GEMMA as TUNIX_GEMMA
from .library_path_maps import TUNIX_LLAMA as TUNIX_LLAMA
from .peft_files import load_peft as load_peft
from .peft_files import peft_config as peft_config
from .peft_files import peft_options as peft_options
from .peft_files import save_peft as save_peft
