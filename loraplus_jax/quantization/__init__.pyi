"""Weights that stay packed in 4 to 8 bits."""

from .packed_array import PackedArray as PackedArray
from .packed_array import dense_shapes as dense_shapes
from .packed_array import is_packed as is_packed
from .packed_array import quantize as quantize
