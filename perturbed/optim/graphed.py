"""Training steps as CUDA graphs: recorded once, replayed with fresh noise."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import as_count
from .strategy import EvolutionStrategy


class GraphedStep:
    """Steps of an evolution strategy that a GPU replays without Python: ``step(*inputs) -> loss``.

    Small networks spend a step on launching kernels. Here the forward, the shaping, the estimate
    and the optimizer's step are recorded in a CUDA graph once; every call then draws fresh noise
    (the graph reads seed, generation and sigma from tensors), copies the inputs to where the graph
    reads them, and replays it. A call is a step like any other: the counters, ``stats`` and
    ``state_dict`` of ``optimizer`` go on, and the noise is that of ``optimizer.step``.

    The first ``warmup`` calls are ordinary steps. The graph is recorded anew, within the call,
    where it no longer fits: other shapes of inputs, other numbers in the ``param_groups`` of the
    torch optimizer, parameters that moved or were frozen. A schedule that changes the learning rate
    at every step needs one that is a tensor (``lr=torch.tensor(0.01)``, ``capturable=True``).

    On other devices there is nothing to record, and every call is an ordinary step.

    Args:
        optimizer: :class:`NES` or :class:`ARS` in one process, without ``max_memory`` and
            ``normalizer``. Its torch optimizer must be fit for graphs, ``capturable=True`` where it
            has the option (Adam).
        closure: called with the inputs, returns the values of rows or members as for
            ``optimizer.step``. It must not wait for the GPU (``item()``, conditions on values).
            What else it reads is read where it was when recorded.
        warmup: ordinary steps before the graph is recorded, at least 1.

    Attributes:
        captures: graphs recorded so far.

    Raises:
        TypeError: arguments of another type.
        ValueError: warmup below 1; an optimizer with several processes, max_memory or a normalizer.

    Example:
        >>> import torch, perturbed
        >>> net = perturbed.convert(torch.nn.Linear(8, 1), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, sigma=0.1)
        >>> nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), lr=0.1))
        >>> step = perturbed.GraphedStep(nes, lambda x: pm(pm.replicate(x)).square().mean(-1))
        >>> losses = [step(torch.ones(4, 8)) for _ in range(3)]
        >>> nes.steps
        3
    """

    def __init__(
        self,
        optimizer: EvolutionStrategy,
        closure: Callable[..., Any],
        warmup: int = 3,
    ) -> None:
        """Check and store the arguments; nothing runs yet."""
        if not isinstance(optimizer, EvolutionStrategy):
            raise TypeError(f"optimizer must be NES or ARS, got {type(optimizer).__name__}")
        if not callable(closure):
            raise TypeError(f"closure must be a function of the inputs, got {closure!r}")
        if optimizer.evaluation.processes is not None:
            raise ValueError("optimizer must train in one process, got one with others")
        if optimizer.evaluation.budget is not None:
            raise ValueError(
                "optimizer must have no max_memory, which measures forwards; give it chunk="
            )
        if optimizer.normalizer is not None:
            raise ValueError("optimizer must have no normalizer, whose statistics live on the host")
        self.optimizer = optimizer
        self.closure = closure
        self.warmup = as_count("warmup", warmup)
        self.captures = 0
        self._calls = 0
        self._graph: Graph | None = None
        self._fits: Hashable = None  # what the graph was recorded for
        # What it reads and writes, which must not be freed before it.
        self._inputs: list[Tensor] = []
        self._grads: list[tuple[nn.Parameter, Tensor]] = []
        self._weights: Tensor = torch.empty(0)  # of the estimate
        self._numbers: tuple[Tensor, Tensor, Tensor] = (self._weights,) * 3
        self._finite: Tensor = torch.empty(0)  # finite members of all steps

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Take one step.

        Args:
            *inputs: tensors for the closure, of any device; they are copied.

        Returns:
            () mean over the finite members, as ``optimizer.step``.

        Raises:
            TypeError: inputs that are no tensors.
            RuntimeError: of torch, for a closure or optimizer that cannot be recorded.
        """
        for i, x in enumerate(inputs):
            if not isinstance(x, Tensor):
                raise TypeError(f"inputs must be tensors, got {type(x).__name__} as number {i}")
        device = self.optimizer._parameters()[0].device
        self._calls += 1
        if not records(device):
            return self.optimizer.step(lambda: self.closure(*inputs))
        if self._calls <= self.warmup:
            with side_stream(device):
                inputs = tuple(x.to(device, non_blocking=True) for x in inputs)
                return self.optimizer.step(lambda: self.closure(*inputs))
        return self._replay(inputs, device)

    @torch.no_grad()
    def _replay(self, inputs: tuple[Tensor, ...], device: torch.device) -> Tensor:
        opt = self.optimizer
        before, asked = opt._snapshot(), opt._asked
        try:
            opt.ask()
            # Held noise would be read where it is now: the graph makes its own.
            opt.pm.state.held.clear()
            fits = self._signature(inputs, device)
            graph = self._graph
            if graph is None or fits != self._fits:
                graph = self._record(inputs, device)
                self._fits = fits
            for place, x in zip(self._inputs, inputs, strict=True):
                place.copy_(x, non_blocking=True)
            for parameter, grad in self._grads:  # which zero_grad may have dropped
                parameter.grad = grad
            if opt._finite is not self._finite:  # there were ordinary steps in between
                self._finite.copy_(torch.as_tensor(opt._finite))
        except BaseException:
            self._graph = None
            opt._restore(before)
            opt._asked = asked
            raise
        graph.replay()
        opt._estimated = self._weights, opt.pm.get_extra_state()
        opt._told(self._numbers[0].numel(), self._numbers, self._finite)
        return self._numbers[2].clone()

    def _record(self, inputs: tuple[Tensor, ...], device: torch.device) -> Graph:
        """Record what follows a draw; nothing of it is executed."""
        opt = self.optimizer
        self._graph = None  # its memory goes before another one's is taken
        self._inputs = [x.to(device, copy=True) for x in inputs]
        # Gradients get their memory out here; in the graph it would be the graph's own.
        for parameter in opt._parameters():
            if parameter.grad is None or not parameter.grad.is_contiguous():
                parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        finite = torch.zeros((), dtype=torch.int64, device=device)

        def body() -> tuple[Tensor, Tensor, Tensor]:
            members = opt._members(opt._score(lambda: self.closure(*self._inputs)))
            opt._update(-members if opt.maximize else members)
            numbers = opt._numbers(members)
            finite.add_(numbers[1])
            return numbers

        graph = Graph()
        try:
            self._numbers = graph.capture(body)
        finally:
            opt.pm.state.held.clear()  # recorded, not computed
        assert opt._estimated is not None
        self._graph, self._finite, self._weights = graph, finite, opt._estimated[0]
        self._grads = [(p, p.grad) for p in opt._parameters() if p.grad is not None]
        self.captures += 1
        return graph

    def _signature(self, inputs: tuple[Tensor, ...], device: torch.device) -> Hashable:
        """Return what a graph depends on beside the contents of tensors."""
        opt = self.optimizer
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        groups = tuple(
            tuple(_constant(value) for key, value in group.items() if key != "params")
            for group in opt.optimizer.param_groups
        )
        # All of the optimizer's parameters: what the model does not perturb moves along.
        own = [p for group in opt.optimizer.param_groups for p in group["params"]]
        parameters = tuple((p.data_ptr(), p.requires_grad) for p in [*opt._parameters(), *own])
        buffers = tuple(
            tuple(_constant(value) for value in opt.optimizer.state[p].values())
            for p in own
            if p in opt.optimizer.state
        )
        state = opt.pm.state
        key, sigma = state.tensors(device)
        draw = (key.data_ptr(), sigma.data_ptr(), state.first_direction, state.directions)
        return shapes, groups, parameters, buffers, draw, opt.pm.model.training


def _constant(value: Any) -> Hashable:
    """Return what of a hyperparameter is recorded: a tensor's place, not its contents."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, (list, tuple)):
        return tuple(_constant(v) for v in value)
    return value if isinstance(value, Hashable) else id(value)


# ---- what CUDA does; tests put a recorder of operators in its place -----------------------------


def records(device: torch.device) -> bool:
    """Whether steps on ``device`` can be recorded."""
    return device.type == "cuda"


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Put the work of a block on a stream of its own, between what is before and after it.

    Libraries make their workspaces at the first call, which must not be on the default stream for a
    graph to be recorded later.
    """
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class Graph:
    """A CUDA graph."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, body: Callable[[], Any]) -> Any:
        """Record ``body``; what it returns gets its values with every replay."""
        with torch.cuda.graph(self._graph):
            return body()

    def replay(self) -> None:
        """Do what was recorded, on the current stream."""
        self._graph.replay()
