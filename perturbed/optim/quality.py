"""How good the estimate of a step is: what two halves of its population make of it.

A step's estimate is a sum over directions, g = sum_d w_d E_d. Cut the population into halves A and
B, and each gives an estimate of its own from noise that the other has not seen. What they have in
common is signal, where they differ is noise: with n_A + n_B = D directions,

    signal = D^2 <g_A / n_A, g_B / n_B>              expectation: |E g|^2
    noise  = n_A n_B |g_A / n_A - g_B / n_B|^2       expectation: the trace of Cov g

whatever the losses are, as long as directions are drawn independently. ``snr = signal / noise`` is
the signal-to-noise ratio of g. McCandlish, Kaplan, Amodei, OpenAI Dota Team, "An Empirical Model of
Large-Batch Training" (2018), appendix A.1, tell signal and noise apart by batches of two sizes;
their noise scale, the size at which both are equal, is here D / snr directions. Split halves are
older: Spearman, "Correlation calculated from faulty data", and Brown, "Some experimental results in
the correlation of mental abilities" (both British Journal of Psychology 3, 1910), by whose formula
the cosine of g with what it estimates is about ``sqrt(2 c / (1 + c)) = sqrt(snr / (1 + snr))`` for
a cosine c between the halves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import as_count, check_entries, check_number
from ..logs import Log, Record
from .base import PopulationOptimizer
from .strategy import EvolutionStrategy


def estimate_quality(optimizer: EvolutionStrategy) -> dict[str, float]:
    """Measure the estimate of the last step; the training does not notice.

    It costs one more estimate and, for the moment, the memory of two more gradients. Where
    processes share the population, all of them call it, and get the same numbers.

    Returns:
        ``cosine`` between the estimates of the halves; ``chance``, its standard deviation if the
        losses said nothing about the noise, 1 / sqrt(N) for N perturbed numbers; ``snr``. They are
        NaN where an estimate is zero. Values of one step are noisy, and ``snr`` may be negative:
        :class:`EstimateQuality` averages.

    Raises:
        TypeError: an optimizer without such an estimate (PSO, SNES, PGPE).
        RuntimeError: no step so far, or another draw since.
        ValueError: a population of one direction.

    Example:
        >>> import torch, perturbed
        >>> net = perturbed.convert(torch.nn.Linear(8, 1), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, sigma=0.1)
        >>> nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), lr=0.1))
        >>> x = pm.replicate(torch.ones(4, 8))
        >>> loss = nes.step(lambda: pm(x).square().mean(-1))
        >>> found = perturbed.estimate_quality(nes)
        >>> abs(found["cosine"]) <= 1, round(found["chance"], 2)  # of 9 parameters
        (True, 0.33)
    """
    found = _measure(optimizer)
    return {
        "cosine": found.cosine,
        "chance": found.chance,
        "snr": _ratio(found.signal, found.noise),
    }


class EstimateQuality(Log):
    """Measures the estimate of a run now and then: a log that goes beside those that write.

    Adds to the record of every ``every``-th step ``cosine``, that of its two halves, and ``snr``,
    the ratio of signal and noise averaged over measurements: their mean until there are ``average``
    of them, from then on one that forgets (McCandlish et al. average both, and then divide, too).
    A cosine without signal has the standard deviation 1 / sqrt(N) for N perturbed numbers, and so
    an ``snr`` of n measurements is certain to about 2 / sqrt(n N).

    docs/logging.md says what to do about it.

    Args:
        every: steps between two measurements, each of which costs one estimate.
        average: measurements that the average remembers.

    Raises:
        TypeError: arguments that are no integers.
        ValueError: arguments below 1.

    Example:
        >>> import torch, perturbed
        >>> net = perturbed.convert(torch.nn.Linear(8, 1), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, sigma=0.1)
        >>> nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), lr=0.01))
        >>> x = pm.replicate(torch.ones(4, 8))
        >>> log = [perturbed.EstimateQuality(every=10)]
        >>> for record in perturbed.train(nes, lambda: pm(x).square().mean(-1), 20, log=log):
        ...     if "snr" in record:
        ...         print(record["step"], record["snr"] > 0)
        10 True
        20 True
    """

    everywhere = True

    def __init__(self, every: int = 50, average: int = 20) -> None:
        """Check and store; nothing is measured yet."""
        self.every, self.average = as_count("every", every), as_count("average", average)
        self._optimizer: EvolutionStrategy | None = None
        self._count, self._signal, self._noise = 0, 0.0, 0.0

    def open(self, optimizer: PopulationOptimizer, steps: int | None = None) -> None:
        """Begin to measure the estimates of ``optimizer``.

        Raises:
            TypeError: an optimizer without such an estimate (PSO, SNES, PGPE).
            ValueError: a population of one direction.
        """
        self._optimizer = _check(optimizer)

    def __call__(self, record: Record) -> None:
        """Measure, if it is time, and add to the record."""
        if self._optimizer is None:
            raise RuntimeError("EstimateQuality: call open(optimizer) first")
        if record["step"] % self.every:
            return
        found = _measure(self._optimizer)
        if math.isfinite(found.signal) and math.isfinite(found.noise):
            self._count += 1
            share = max(1 / self._count, 1 / self.average)
            self._signal += share * (found.signal - self._signal)
            self._noise += share * (found.noise - self._noise)
        record["cosine"] = found.cosine
        record["snr"] = _ratio(self._signal, self._noise)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, for a run whose resumed log is to go on with them."""
        return {"count": self._count, "signal": self._signal, "noise": self._noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        check_entries("state", state, ("count", "signal", "noise"))
        count = as_count("state['count']", state["count"], 0)
        signal, noise = (
            check_number(f"state[{key!r}]", state[key], low=-math.inf)
            for key in ("signal", "noise")
        )
        self._count, self._signal, self._noise = count, signal, noise


# ---- how -----------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    cosine: float
    chance: float
    signal: float
    noise: float


def _check(optimizer: object) -> EvolutionStrategy:
    if not isinstance(optimizer, EvolutionStrategy):
        raise TypeError(
            "optimizer must sum the noise of its directions to an estimate (NES, ARS), got "
            f"{type(optimizer).__name__}"
        )
    if optimizer.pm.population < 2:
        raise ValueError("optimizer must have at least 2 directions to compare, got 1")
    return optimizer


@torch.no_grad()
def _measure(optimizer: object) -> _Measured:
    optimizer = _check(optimizer)
    if optimizer._estimated is None:
        raise RuntimeError("estimate_quality: there is no estimate yet; call step() first")
    weights, draw = optimizer._estimated
    if draw != optimizer.pm.get_extra_state():
        raise RuntimeError(
            "estimate_quality: the noise of the last estimate is gone; measure after step() or "
            "tell(), before the next draw"
        )
    n = optimizer.pm.population
    n_a, n_b = n // 2, n - n // 2
    a = _estimate(optimizer, weights, 0, n_a)
    b = _estimate(optimizer, weights, n_a, n_b)
    products = [(_dot(x, x), _dot(y, y), _dot(x, y)) for x, y in zip(a, b, strict=True)]
    a_a, b_b, a_b = torch.stack([torch.stack(three) for three in products]).sum(0).tolist()
    lengths = math.sqrt(a_a) * math.sqrt(b_b)
    return _Measured(
        cosine=a_b / lengths if lengths > 0 else math.nan,
        chance=1 / math.sqrt(sum(part.numel() for part in a)),
        signal=n * n / (n_a * n_b) * a_b,
        noise=n_b / n_a * a_a + n_a / n_b * b_b - 2 * a_b,
    )


def _dot(x: Tensor, y: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) * y.to(wide)).sum(dtype=torch.float64)


def _ratio(signal: float, noise: float) -> float:
    return signal / noise if noise > 0 else math.nan


def _estimate(
    optimizer: EvolutionStrategy, weights: Tensor, first: int, count: int
) -> list[Tensor]:
    """Return what directions ``first`` .. ``first + count - 1`` give; ``.grad`` stays as it is."""
    evaluation, parameters = optimizer.evaluation, optimizer._parameters()
    last = first + count
    shared = evaluation.processes is not None and evaluation.estimate != "full"
    if shared:  # this process's part of them, maybe none
        split = evaluation.split
        first, last = max(first, split.first), min(last, split.first + split.count)
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None  # set_grad would write into it
        if first < last:
            with optimizer.pm.window(first, last - first):
                optimizer.pm.set_grad(weights[first:last])
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
    if shared:
        assert evaluation.processes is not None
        evaluation.processes.add_up(found)
    return found
