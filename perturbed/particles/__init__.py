"""Particles: parameters to compute with, of whole modules or as plain lists of tensors."""

from .draws import rand, randn
from .modules import assign_, clone_from, product
from .particle import Product
from .tensor_list import TensorList, multi_copy

__all__ = [
    "Product",
    "TensorList",
    "assign_",
    "clone_from",
    "multi_copy",
    "product",
    "rand",
    "randn",
]
