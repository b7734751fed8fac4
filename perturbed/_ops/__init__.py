"""The operators of ``perturbed::``: one typed wrapper each, its fake kernel and its derivative.

One file per noise family, and one each for convolutions and particle swarms. No arithmetic lives
here: schemas are in ``csrc/schema.cpp``, kernels in ``csrc/cpu`` and ``csrc/cuda``, and the slow
truth of every operator in ``perturbed/reference``.
"""

from .conv import conv_members_
from .dense import dense_estimate_, dense_linear, dense_linear_, dense_materialise
from .lookup import dense_lookup
from .low_rank import low_rank_linear, low_rank_linear_
from .selection import (
    permuted_estimate_,
    select,
    select_add,
    select_add_,
    selection_sum,
    selections,
)
from .sign_flip import flip, flip_add, flip_add_
from .sparse import sparse_estimate_, sparse_linear, sparse_linear_
from .swarm import swarm_move_, uniforms

__all__ = [
    "conv_members_",
    "dense_estimate_",
    "dense_linear",
    "dense_linear_",
    "dense_lookup",
    "dense_materialise",
    "flip",
    "flip_add",
    "flip_add_",
    "low_rank_linear",
    "low_rank_linear_",
    "permuted_estimate_",
    "select",
    "select_add",
    "select_add_",
    "selection_sum",
    "selections",
    "sparse_estimate_",
    "sparse_linear",
    "sparse_linear_",
    "swarm_move_",
    "uniforms",
]
