"""The operators of ``csrc/schema.cpp`` in plain torch, with the noise materialised.

Slow, short and written from the contract (``docs/conventions.md``), not from the kernels: the
oracle of the tests, and the path for devices that have no kernels. Each function is named after its
operator, takes the same arguments in the same order and returns its result; nothing is changed in
place. Those that draw normals also take ``exact`` (see :mod:`.noise`). Shapes: D directions,
R repeats, B = R * D rows, T tokens, m = out, n = in.

Functions reach the noise through ``noise.dense_materialise``, so that a test that replaces this one
name replaces the noise of every family.
"""

from . import conv, dense, lookup, low_rank, noise, rows, selection, sign_flip, sparse, swarm
from .conv import conv_members
from .dense import dense_estimate, dense_linear
from .lookup import dense_lookup
from .low_rank import low_rank_linear
from .noise import box_muller, dense_materialise, philox4x32, splitmix64, words
from .selection import (
    permutation,
    permuted_estimate,
    select,
    select_add,
    selection_sum,
    selections,
)
from .sign_flip import flip, flip_add
from .sparse import sparse_estimate, sparse_linear
from .swarm import swarm_move, uniforms

__all__ = [
    "box_muller",
    "conv",
    "conv_members",
    "dense",
    "dense_estimate",
    "dense_linear",
    "dense_lookup",
    "dense_materialise",
    "flip",
    "flip_add",
    "lookup",
    "low_rank",
    "low_rank_linear",
    "noise",
    "permutation",
    "permuted_estimate",
    "philox4x32",
    "rows",
    "select",
    "select_add",
    "selection",
    "selection_sum",
    "selections",
    "sign_flip",
    "sparse",
    "sparse_estimate",
    "sparse_linear",
    "splitmix64",
    "swarm",
    "swarm_move",
    "uniforms",
    "words",
]
