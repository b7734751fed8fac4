"""The loss of a closure as scipy sees it: a function of one float64 vector, with derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..zeroth.closure import call, to_loss

ROWS = 64  # of a Hessian in one backward; more is no faster and takes memory

HOW = (
    "return the loss with its graph, or call backward() on it (not under torch.no_grad, not as "
    "loss.item()); Nelder-Mead, Powell, COBYLA and COBYQA need no gradient"
)


class Problem:
    """A closure's loss as a function of the parameters, flattened and joined.

    The parameters are evaluated in their own dtypes and changed in place; vectors are (N,) float64.
    The last point is kept with its graph, so that its loss, gradient and Hessian-vector products
    together take one evaluation.

    Losses that are NaN or infinite count as worse than all that were finite, with a gradient of
    zeros; single elements of a gradient that are not finite count as 0.

    Args:
        closure: as :meth:`Minimize.step` takes it.
        parameters: that require grad.
        derivatives: 0, 1 or 2: how many the method needs.
        bounds: (N,) lower and upper ends; points outside are never the best one.
        model: whose buffers every evaluation finds as they are now; None for no model.

    Attributes:
        start: the parameters, moved into the bounds.
        evaluations: calls of the closure.
        best_loss: the least finite loss; infinite before any.
        best: its point.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        parameters: Sequence[Tensor],
        derivatives: int,
        bounds: tuple[np.ndarray, np.ndarray],
        model: nn.Module | None,
    ) -> None:
        """Note where everything is; the closure is not called yet."""
        self.closure, self.parameters, self.derivatives = closure, parameters, derivatives
        self.lower, self.upper = bounds
        self.buffers = [] if model is None else list(model.buffers())
        self._before = [p.detach().clone() for p in parameters]
        self._grads = [p.grad for p in parameters]
        self._buffers_before = [b.detach().clone() for b in self.buffers]
        self._buffers_best = self._buffers_before
        self.start = np.clip(self.flatten(parameters), self.lower, self.upper)
        self.evaluations = 0
        self.best_loss, self.best = math.inf, self.start
        self.worst = -math.inf  # of the finite ones
        self._point: np.ndarray | None = None  # where the parameters are
        self._batches = True
        self._forget()

    # ---- vectors and parameters ----------------------------------------------------------------

    def flatten(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """Join tensors of the parameters' shapes, after any others, to vectors: (..., N)."""
        flat = [
            t.detach().to_dense().reshape((*t.shape[: t.dim() - p.dim()], -1))
            for t, p in zip(tensors, self.parameters, strict=True)
        ]
        if len({t.device for t in flat}) > 1:
            flat = [t.cpu() for t in flat]
        # On the CPU before it is widened: not every device has float64. A copy, scipy's to keep.
        return torch.cat(flat, -1).cpu().to(torch.float64, copy=True).numpy()

    def split(self, vectors: np.ndarray) -> list[Tensor]:
        """Return the parts of vectors, (..., N), each with its parameter's shape, dtype, device."""
        flat = torch.from_numpy(np.array(vectors, dtype=np.float64))
        parts = flat.split([p.numel() for p in self.parameters], -1)
        return [
            part.to(p.dtype).to(p.device).reshape((*part.shape[:-1], *p.shape))
            for part, p in zip(parts, self.parameters, strict=True)
        ]

    @torch.no_grad()
    def write(self, point: np.ndarray) -> None:
        """Have the parameters hold a point."""
        if self._point is not None and np.array_equal(point, self._point):
            return
        self._forget()  # its graph would find other numbers
        for parameter, part in zip(self.parameters, self.split(point), strict=True):
            parameter.copy_(part)
        self._point = np.array(point, dtype=np.float64)

    @torch.no_grad()
    def _write_buffers(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)

    def restore_buffers(self) -> None:
        """Have the model's buffers as they were, for an evaluation to find them so."""
        self._write_buffers(self._buffers_before)

    @torch.no_grad()
    def undo(self) -> None:
        """Put parameters and buffers back to where they were; the gradients too."""
        for parameter, before in zip(self.parameters, self._before, strict=True):
            parameter.copy_(before)
        self.restore_buffers()
        self._restore_grads()

    def finish(self, point: np.ndarray) -> None:
        """Leave the parameters at a point, and the buffers as its evaluation left them."""
        self.write(point)
        self._forget()
        best = np.array_equal(point, self.best)
        self._write_buffers(self._buffers_best if best else self._buffers_before)
        self._restore_grads()

    def _restore_grads(self) -> None:
        for parameter, grad in zip(self.parameters, self._grads, strict=True):
            parameter.grad = grad

    # ---- the loss ------------------------------------------------------------------------------

    def loss(self, point: np.ndarray) -> float:
        """Return the loss at a point, whatever it is."""
        self._evaluate(point)
        return self._loss

    def value(self, point: np.ndarray) -> float:
        """Return the loss at a point; for one that is not finite, more than any finite one."""
        self._evaluate(point)
        if math.isfinite(self._loss):
            return self._loss
        # Not infinity: line searches interpolate.
        return self.worst + max(1.0, abs(self.worst)) if math.isfinite(self.worst) else 1.0

    def value_or_inf(self, point: np.ndarray) -> float:
        """Return the loss at a point, infinity if it is not finite: for methods that compare."""
        self._evaluate(point)
        return self._loss if math.isfinite(self._loss) else math.inf

    def _forget(self) -> None:
        self._loss = math.nan
        self._evaluated = False
        self._graph: Tensor | None = None  # of the loss
        self._slopes: list[Tensor] | None = None  # gradient, with its graph if there are two
        self._gradient: np.ndarray | None = None

    def _evaluate(self, point: np.ndarray) -> None:
        """Call the closure at a point, unless it was the last one."""
        self.write(point)
        if self._evaluated:
            return
        self.restore_buffers()
        for parameter in self.parameters:
            parameter.grad = None  # what is there afterwards is the closure's
        with torch.set_grad_enabled(self.derivatives > 0):
            result = call(self.closure)
        self._loss = to_loss(result)
        self._evaluated = True
        self.evaluations += 1
        finite = math.isfinite(self._loss)
        if self.derivatives > 0:
            self._keep_graph(result)
        if not finite:
            self._gradient = np.zeros_like(self.start)
            return
        self.worst = max(self.worst, self._loss)
        inside = (point >= self.lower).all() and (point <= self.upper).all()
        if inside and self._loss < self.best_loss:
            self.best_loss, self.best = self._loss, np.array(point)
            self._buffers_best = [b.detach().clone() for b in self.buffers]

    def _keep_graph(self, result: Any) -> None:
        """Find the gradient that the closure made, or the graph to make it from."""
        if any(p.grad is not None for p in self.parameters):
            if self.derivatives > 1:
                raise ValueError(
                    "closure must return the loss without backward() for a method that needs the "
                    "Hessian: the loss is differentiated twice here"
                )
            self._slopes = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters
            ]
        elif isinstance(result, Tensor) and result.requires_grad:
            self._graph = result.reshape(())
        else:
            raise ValueError(f"closure must have a gradient for this method: {HOW}")

    # ---- derivatives ---------------------------------------------------------------------------

    def gradient(self, point: np.ndarray) -> np.ndarray:
        """Return the gradient at a point, (N,)."""
        self._evaluate(point)
        if self._gradient is None:
            self._gradient = _finite(self.flatten(self._differentiate()))
        return self._gradient.copy()

    def _differentiate(self) -> list[Tensor]:
        if self._slopes is None:
            assert self._graph is not None
            self._slopes = list(
                torch.autograd.grad(
                    self._graph,
                    self.parameters,
                    create_graph=self.derivatives > 1,
                    materialize_grads=True,  # zeros for parameters that the loss does not use
                )
            )
        return self._slopes

    def product(self, point: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """Return the Hessian at a point times a vector, (N,): one more backward, exact."""
        self._evaluate(point)
        return self._products(np.asarray(vector, dtype=np.float64).reshape(1, -1), False)[0]

    def hessian(self, point: np.ndarray) -> np.ndarray:
        """Return the Hessian at a point, (N, N): N products, of which many share a backward."""
        self._evaluate(point)
        rows = np.eye(len(self.start))
        parts = [
            self._products(rows[i : i + ROWS], self._batches) for i in range(0, len(rows), ROWS)
        ]
        matrix = np.concatenate(parts)
        return (matrix + matrix.T) / 2

    def _products(self, vectors: np.ndarray, batched: bool) -> np.ndarray:
        """Return the Hessian at the last point times vectors, (K, N) each.

        Args:
            vectors: (K, N).
            batched: whether to do it in one backward, which torch cannot for every operator.
        """
        if not math.isfinite(self._loss):
            return np.zeros_like(vectors)
        # A slope without a graph is constant, as of a loss that is linear in a parameter.
        pairs = zip(self._differentiate(), self.split(vectors), strict=True)
        curved = [(slope, part) for slope, part in pairs if slope.requires_grad]
        if not curved:
            return np.zeros_like(vectors)
        slopes, parts = zip(*curved, strict=True)

        def backward(parts: Sequence[Tensor], batch: tuple[int, ...]) -> np.ndarray:
            products = torch.autograd.grad(
                slopes,
                self.parameters,
                parts,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=bool(batch),
            )
            pairs = zip(products, self.parameters, strict=True)
            zeros = [p.new_zeros((*batch, *p.shape)) if r is None else r for r, p in pairs]
            return _finite(self.flatten(zeros))

        if batched:
            try:
                return backward(parts, (len(vectors),))
            except RuntimeError:
                self._batches = False  # an operator that torch cannot batch
        return np.stack([backward(row, ()) for row in zip(*parts, strict=True)])

    def convex_hessian(self, point: np.ndarray) -> np.ndarray:
        """Return the Hessian with eigenvalues made positive, for dogleg, which needs that.

        Their absolute values, as in the saddle-free Newton method (Dauphin et al. 2014), and not
        less than what rounding leaves of them.
        """
        values, vectors = np.linalg.eigh(self.hessian(point))
        sizes = np.abs(values)
        eps = max(torch.finfo(p.dtype).eps for p in self.parameters)
        floor = max(eps ** (2 / 3) * sizes.max(initial=0.0), np.finfo(np.float64).tiny ** 0.5)
        return (vectors * np.maximum(sizes, floor)) @ vectors.T


def _finite(vector: np.ndarray) -> np.ndarray:
    """Set what is not finite to 0, in place."""
    vector[~np.isfinite(vector)] = 0.0
    return vector
