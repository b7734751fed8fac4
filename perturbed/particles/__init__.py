"""Containers of particles: parameter vectors as they are held between evaluations."""

from .tensor_list import TensorList, multi_copy

__all__ = ["TensorList", "multi_copy"]
