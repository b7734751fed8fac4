"""scipy.optimize as an optimizer of torch: local methods, exact derivatives, global methods."""

from .methods import METHODS, Method
from .optimizer import Minimize

__all__ = ["METHODS", "Method", "Minimize"]
