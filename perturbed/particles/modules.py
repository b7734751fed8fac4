"""From modules to products, and into modules."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .combine import compute, compute_into
from .particle import Product, detached
from .structure import Predicate, Structure, check_same, choose


def product(module: nn.Module, where: Predicate | None = None, frozen: bool = False) -> Product:
    """Return the parameters of a module as a value to compute with.

    Parameters that are not chosen are never changed; a module that is made from the product has
    copies of them. Of a module with sub-modules any part can be taken: ``product(net.encoder)``.

    Args:
        module: any module. Nothing is copied.
        where: says by a parameter's name whether it takes part. Default: all do.
        frozen: whether parameters with ``requires_grad=False`` do, too.

    Raises:
        TypeError: no module; integer parameters among those that take part.
        ValueError: no parameter takes part, or one is still lazy.

    Example:
        >>> import torch
        >>> from perturbed.particles import product
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> half = (0.5 * product(net, where=lambda name: name.startswith("0."))).module()
        >>> torch.equal(half[1].weight, net[1].weight)
        True
    """
    return Product(Structure(module, choose(where, frozen)))


@detached
def assign_(target: nn.Module | Product, value: nn.Module | Product) -> nn.Module | Product:
    """Write the value of a product into the parameters of a module.

    They stay the same Parameters, so optimizers stay valid, and they share no memory with the
    value. Buffers stay.

    Args:
        target: a module, or a product that stands for one.
        value: a product, or a module, with the same names and shapes; dtype and device may differ.
            ``(1 - a) * p + a * q`` into the module of ``p`` takes one pass over memory.

    Returns:
        The target.

    Raises:
        TypeError: something else, or a target that stands for no module.
        ValueError: another structure, naming the first parameter that differs.

    Example:
        >>> import torch
        >>> from perturbed.particles import assign_, product
        >>> net, best = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> assign_(net, 0.5 * product(net) + 0.5 * product(best))
        Linear(in_features=4, out_features=3, bias=True)
    """
    into = target
    if isinstance(target, nn.Module):
        into = value._bind(target) if isinstance(value, Product) else product(target)
    if not isinstance(into, Product) or not into._bound:
        got = "a value" if isinstance(target, Product) else type(target).__name__
        raise TypeError(f"target must be a module or product(module), got {got}")
    if isinstance(value, nn.Module):
        value = into._bind(value)
    if not isinstance(value, Product):
        raise TypeError(f"value must be a product or a module, got {type(value).__name__}")
    into._structure.check_current()
    check_same(into._structure, value._structure, shapes_only=True)
    tensors, combination = into._like(), value._current()
    if into._structure.kinds == value._structure.kinds:
        compute_into(tensors, combination)
    else:
        torch._foreach_copy_(tensors, compute(combination))
    return target


@detached
def clone_from(module: nn.Module, source: nn.Module) -> nn.Module:
    """Return a copy of a module with the parameters and buffers of another one.

    Args:
        module: what the copy's structure, hooks and Python attributes come from, ``requires_grad``,
            dtypes and devices included.
        source: a module with the same names and shapes, of any class.

    Raises:
        TypeError: something else.
        ValueError: another structure, naming the first parameter that differs, or other buffers.

    Example:
        >>> import torch
        >>> from perturbed.particles import clone_from
        >>> net = torch.nn.BatchNorm1d(3)
        >>> pool = [net] + [clone_from(net, torch.nn.BatchNorm1d(3)) for _ in range(11)]
    """
    mine = Structure(module, lambda *_: True)
    theirs = mine.of(source)
    check_same(mine, theirs, shapes_only=True)
    clone = copy.deepcopy(module)
    try:
        clone.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise ValueError(f"source must have the state of module: {error}") from None
    return clone
