"""Every public callable with arguments that work, for the fuzzer to put wrong ones in their place.

A target makes the callable and its arguments anew for each call, and says what is done with the
result: an argument that is only used later must be refused early, or must work.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import perturbed
from perturbed import PerturbedModel, optim, particles, rl
from perturbed.nn import Affine, PerturbedLayer

D = 4


@dataclasses.dataclass(frozen=True)
class Target:
    """`make` returns the callable and its keyword arguments; `use` tries what it returned."""

    make: Callable[[], tuple[Callable[..., Any], dict[str, Any]]]
    use: Callable[[Any], Any] = lambda result: None
    skip: tuple[str, ...] = ()  # arguments that mean anything


TARGETS: dict[str, Target] = {}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def population(noise: Any = None, **options: Any) -> PerturbedModel:
    """A network with noise drawn."""
    net = perturbed.convert(network(), D, noise)
    pm = PerturbedModel(net, D, sigma=0.1, **options)
    if noise != perturbed.Explicit():
        pm.set_noise()
    return pm


def explicit() -> PerturbedModel:
    return population(perturbed.Explicit())


def losses(pm: Any) -> Tensor:
    return pm(pm.replicate(torch.ones(2, 3))).squeeze(-1).square()


def call(
    name: str, function: Callable[..., Any], use: Any = None, /, *, skip: Any = (), **arguments: Any
) -> None:
    """Add a function; an argument that is a function is called for a fresh value."""

    def make() -> tuple[Callable[..., Any], dict[str, Any]]:
        return function, {k: v() if callable(v) else v for k, v in arguments.items()}

    TARGETS[name] = Target(make, use or (lambda result: None), skip)


def method(owner: Callable[[], Any], name: str, use: Any = None, /, **arguments: Any) -> None:
    """Add a method of an object that `owner` makes."""

    def make() -> tuple[Callable[..., Any], dict[str, Any]]:
        value = owner()
        values = {k: v() if callable(v) else v for k, v in arguments.items()}
        return getattr(value, name), values

    TARGETS[f"{type(owner()).__name__}.{name}"] = Target(make, use or (lambda result: None))


# ---- families ------------------------------------------------------------------------------------


def convert_with(noise: Any) -> None:
    try:
        pm = population(noise)
    except ValueError:  # a count that does not fit these layers
        return
    losses(pm)
    pm.set_grad(torch.ones(D))


for family in ("Dense", "LowRank", "Permuted", "SignFlip", "Sparse"):
    call(family, getattr(perturbed, family), convert_with)
call("Explicit", perturbed.Explicit)

# ---- layers --------------------------------------------------------------------------------------


def forward(*shapes: tuple[int, ...], ids: bool = False) -> Callable[[nn.Module], None]:
    """Run a layer on ones, and its population where it has one."""

    def use(layer: nn.Module) -> None:
        directions = getattr(layer, "directions", D)
        if directions > 100:
            raise MemoryError(f"{directions} directions")
        rows = [torch.ones(2 * directions, *shape) for shape in shapes]
        rows = [x.long() for x in rows] if ids else rows
        layer.eval()(*rows)
        if isinstance(layer, PerturbedLayer) and any(True for _ in layer.parameters()):
            pm = PerturbedModel(layer, directions)
            pm.set_noise()
            pm(*rows)

    return use


LINEARS = ("Perturbed", "LowRank", "Permuted", "SignFlip", "SparsePerturbed")
for prefix in LINEARS:
    layer = f"{prefix}Linear"
    call(
        layer, getattr(perturbed, layer), forward((3,)),
        in_features=3, out_features=2, directions=D,
    )  # fmt: skip
for dims in (1, 2, 3):
    for kind in ("Conv", "ConvTranspose"):
        layer = f"Perturbed{kind}{dims}d"
        call(
            layer, getattr(perturbed, layer), forward((2, *(3,) * dims)),
            in_channels=2, out_channels=2, kernel_size=2, directions=D,
        )  # fmt: skip
    layer = f"PerturbedBatchNorm{dims}d"
    call(layer, getattr(perturbed, layer), forward((3, *(2,) * dims)), num_features=3, directions=D)
for prefix in ("LowRank", "Permuted", "SignFlip"):
    layer = f"{prefix}Conv2d"
    call(
        layer, getattr(perturbed, layer), forward((2, 3, 3)),
        in_channels=2, out_channels=2, kernel_size=2, directions=D,
    )  # fmt: skip
for layer in ("PerturbedAffine", "PerturbedLayerNorm", "PerturbedRMSNorm"):
    call(layer, getattr(perturbed, layer), forward((3,)), normalized_shape=3, directions=D)
call("Affine", Affine, normalized_shape=3)
call(
    "PerturbedGroupNorm", perturbed.PerturbedGroupNorm, forward((4, 2)),
    num_groups=2, num_channels=4, directions=D,
)  # fmt: skip
call(
    "PerturbedEmbedding", perturbed.PerturbedEmbedding, forward((2,), ids=True),
    num_embeddings=3, embedding_dim=2, directions=D,
)  # fmt: skip
call(
    "PerturbedMultiheadAttention", perturbed.PerturbedMultiheadAttention,
    forward((2, 4), (2, 4), (2, 4)), embed_dim=4, num_heads=2, directions=D, batch_first=True,
)  # fmt: skip
for kind in ("RNN", "GRU", "LSTM"):
    call(
        f"Perturbed{kind}", getattr(perturbed, f"Perturbed{kind}"), forward((2, 3)),
        input_size=3, hidden_size=2, directions=D, batch_first=True, skip=("num_layers",),
    )  # fmt: skip
    call(
        f"Perturbed{kind}Cell", getattr(perturbed, f"Perturbed{kind}Cell"), forward((3,)),
        input_size=3, hidden_size=2, directions=D,
    )  # fmt: skip
call("convert", perturbed.convert, model=network, directions=D)
call("revert", perturbed.revert, model=lambda: population().model)
call("conversion_report", perturbed.conversion_report, str, model=lambda: population().model)
call(
    "register_twin", perturbed.register_twin,
    torch_class=lambda: type("Own", (nn.Linear,), {}),
    perturbed_class=lambda: perturbed.PerturbedLinear,
)  # fmt: skip

# ---- the model -----------------------------------------------------------------------------------


def try_model(pm: PerturbedModel) -> None:
    pm.set_noise()
    losses(pm)
    pm.set_grad(torch.ones(D))


call(
    "PerturbedModel", PerturbedModel, try_model,
    model=lambda: perturbed.convert(network(), D), directions=D,
)  # fmt: skip


def enter(context: Any) -> None:
    with context as pm:
        losses(pm)
        pm.set_grad(torch.ones(pm.directions))


method(population, "window", enter, first=1, count=2)
method(population, "set_noise")
method(population, "set_seed")
method(population, "set_noise_scale", sigma=0.2)
method(population, "set_grad", weights=lambda: torch.ones(D))
method(population, "replicate", lambda x: losses, x=lambda: torch.ones(2, 3))
method(population, "window_rows", x=lambda: torch.ones(2 * D, 3))
method(population, "member_mean", values=lambda: torch.ones(2 * D))
method(population, "member_rows", values=lambda: torch.ones(2 * D))
method(population, "member", lambda m: m(torch.ones(1, 3)), d=1)
method(population, "set_extra_state", state=lambda: {"seed": 0, "generation": 1, "sigma": 0.1})
method(
    explicit, "set_members",
    tensors=lambda: {n: torch.ones(D, *p.shape) for n, p in network().named_parameters()},
)  # fmt: skip
call(
    "Replicated",
    perturbed.Replicated,
    lambda x: x.full(),
    source=lambda: torch.ones(2, 3),
    copies=2,
    directions=D,
)

# ---- optimizers of populations -------------------------------------------------------------------


def step(optimizer: Any) -> None:
    """A step of whatever holds a population, and a state that goes back."""
    pm = optimizer.pm if hasattr(optimizer, "pm") else optimizer.swarm.pm
    optimizer.step(lambda: losses(pm))
    optimizer.load_state_dict(optimizer.state_dict())


def losses_of(member: nn.Module) -> Tensor:
    return member(torch.ones(2, 3)).square().mean()


def sgd(pm: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(pm.model.parameters(), lr=0.1)


def _nes() -> tuple[Callable[..., Any], dict[str, Any]]:
    pm = population()
    return perturbed.NES, {"pm": pm, "optimizer": sgd(pm)}


TARGETS["NES"] = Target(_nes, step)
call("ARS", perturbed.ARS, step, pm=population)
call("SNES", perturbed.SNES, step, model=explicit)
call("PGPE", perturbed.PGPE, step, model=explicit)
call("PSO", perturbed.PSO, step, model=explicit)
call("Swarm", optim.Swarm, model=explicit)


def nes() -> perturbed.NES:
    return _nes()[0](**_nes_arguments())


def _nes_arguments() -> dict[str, Any]:
    return _nes()[1]


method(nes, "step", closure=lambda: lambda: None)


def asked() -> perturbed.NES:
    optimizer = nes()
    optimizer.ask()
    return optimizer


def _graphed() -> tuple[Callable[..., Any], dict[str, Any]]:
    optimizer = nes()
    return perturbed.GraphedStep, {"optimizer": optimizer, "closure": lambda: losses(optimizer.pm)}


TARGETS["GraphedStep"] = Target(_graphed, lambda step: step())
method(asked, "tell", values=lambda: torch.ones(2 * D))
method(nes, "load_state_dict", state=lambda: nes().state_dict())
call("estimate_quality", perturbed.estimate_quality, optimizer=nes)
call("EstimateQuality", perturbed.EstimateQuality)
method(
    perturbed.EstimateQuality,
    "load_state_dict",
    state=lambda: perturbed.EstimateQuality().state_dict(),
)

for variant in ("Accelerated", "BareBones", "CompetitiveSwarm", "ComprehensiveLearning",
                "Constriction", "FullyInformed", "Inertia"):  # fmt: skip
    call(variant, getattr(optim, variant), lambda v: step(perturbed.PSO(explicit(), variant=v)))
call("ring", optim.ring, particles=D)
call("von_neumann", optim.von_neumann, particles=D)
for shaping in ("centered_rank", "identity", "nes_utilities", "zscore"):
    call(shaping, getattr(optim, shaping), losses=lambda: torch.arange(4.0))
for group in ("group_baseline", "group_zscore"):
    call(group, getattr(optim, group), values=lambda: torch.arange(8.0).view(2, 4))

# ---- optimizers of torch's kind ------------------------------------------------------------------


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([0.5, -0.5])), nn.Parameter(torch.ones(2, 2))]


def descend(optimizer: Any) -> None:
    points = [p for group in optimizer.param_groups for p in group["params"]]

    def closure() -> Tensor:
        return sum((p.double() ** 2).sum() for p in points)  # type: ignore[return-value]

    optimizer.step(closure)
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(closure)


SEARCHES: dict[str, dict[str, Any]] = {
    "RDSA": {},
    "SPSA": {},
    "RandomGrad": {"opt": None},
    "RandomBestGrad": {"opt": None},
    "RandomSearch": {},
    "RandomWalk": {},
    "ShrinkingRandomSearch": {},
    "SimulatedAnnealing": {},
    "ThresholdAccepting": {},
    "GridSearch": {"domain": (0, 1), "step": 0.5},
    "SequentialSearch": {"domain": (0, 1), "lr": 0.5},
    "AcceleratedRandomSearch": {"domain": (0, 1)},
}
# Others need no more than parameters.
for name in optim.__all__:
    kind = getattr(optim, name)
    if isinstance(kind, type) and issubclass(kind, optim.ScalarOptimizer):
        if kind is not optim.ScalarOptimizer:
            SEARCHES.setdefault(name, {})


def search(name: str, arguments: dict[str, Any]) -> None:
    kind = getattr(optim, name)

    def make() -> tuple[Callable[..., Any], dict[str, Any]]:
        points = parameters()
        more = dict(arguments)
        if "opt" in more:
            more["opt"] = torch.optim.SGD(points, lr=0.1)
        return kind, {"params": points, **more}

    TARGETS[name] = Target(make, descend)


for name, arguments in SEARCHES.items():
    search(name, arguments)


def with_gradient(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


call("Restoration", optim.Restoration)
call("ClipUp", perturbed.ClipUp, with_gradient, params=parameters)


def minimise(optimizer: Any) -> None:
    points = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.step(lambda: sum((p**2).sum() for p in points))


call("Minimize", perturbed.Minimize, minimise, params=parameters, options={"maxiter": 2})


def pair() -> list[torch.optim.Optimizer]:
    points = parameters()
    return [torch.optim.SGD(points, lr=0.1), torch.optim.Adam(points, lr=0.1)]


for name in ("AlternatingOpt", "OptimizerAverage", "RandomOpt", "SequentialOpt"):
    call(name, getattr(optim, name), with_gradient, optimizers=pair)


def _chain() -> tuple[Callable[..., Any], dict[str, Any]]:
    optimizers = pair()
    return optim.GradChain, {
        "params": optimizers[0].param_groups[0]["params"],
        "optimizers": optimizers,
    }


def _update() -> tuple[Callable[..., Any], dict[str, Any]]:
    points = parameters()
    return optim.UpdateToGrad, {"params": points, "opt": torch.optim.SGD(points, lr=0.1)}


TARGETS["GradChain"] = Target(_chain, with_gradient)
TARGETS["UpdateToGrad"] = Target(_update, lambda o: o.step())
call("with_momentum", optim.with_momentum, with_gradient, optimizer=lambda: pair()[0])
call("SignGrad", optim.SignGrad)


def swarm_step(swarm: Any) -> None:
    points = [p for group in swarm.param_groups for p in group["params"]]
    for _ in range(2):
        swarm.step(lambda: sum((p**2).sum() for p in points))
    swarm.load_state_dict(swarm.state_dict())


call(
    "SwarmOfOptimizers", optim.SwarmOfOptimizers, swarm_step,
    model=parameters, optimizers=lambda: lambda params: torch.optim.SGD(params, lr=0.1), members=2,
)  # fmt: skip

# ---- particles -----------------------------------------------------------------------------------


def tensors() -> perturbed.TensorList:
    return perturbed.TensorList([torch.tensor([1.0, 2.0]), torch.ones(2, 2)])


call("TensorList", perturbed.TensorList, lambda t: t + t, tensors=lambda: list(tensors()))
OPERANDS = {"other": tensors, "end": tensors, "weight": 0.5, "a": tensors, "b": tensors}
for name, needs in {
    "maximum": "other", "maximum_": "other", "minimum": "other", "lt": "other", "eq": "other",
    "clip": "", "clip_": "", "clamp": "", "clamp_": "", "lerp": "end weight", "lerp_": "end weight",
    "addcmul": "a b", "addcmul_": "a b", "addcdiv": "a b", "copy_": "other", "multi_copy_": "other",
    "requires_grad_": "",
}.items():  # fmt: skip
    method(tensors, name, **{n: OPERANDS[n] for n in needs.split()})
method(tensors, "where", condition=lambda: tensors().gt(1.0), other=tensors)
method(tensors, "fill_", value=0.5)
method(tensors, "from_vector", vector=lambda: torch.ones(6))
method(tensors, "uniform_like", generator=1)
method(tensors, "normal_like", generator=1)
call("multi_copy", particles.multi_copy, list1=lambda: list(tensors()), list2=tensors)
call("product", particles.product, lambda p: p + p, module=network)
call("assign_", particles.assign_, target=network, value=network)
call("clone_from", particles.clone_from, module=network, source=network)
call("rand", particles.rand, lambda p: p.module(), like=network, seed=0)
call("randn", particles.randn, lambda p: p.module(), like=network, seed=0)


def particle() -> Any:
    return particles.product(network())


method(particle, "unary", function=lambda: lambda t, name: t)
method(particle, "binary", function=lambda: lambda a, b, name: a, other=particle)

# ---- reinforcement learning ----------------------------------------------------------------------


def play(env: Any) -> None:
    env.reset(torch.arange(env.lanes))
    env.step(
        torch.zeros(env.lanes, dtype=torch.int64) if env.discrete else torch.zeros(env.lanes, 1)
    )


for name in ("Acrobot", "CartPole", "MountainCarContinuous", "Pendulum"):
    call(name, getattr(rl, name), play, lanes=2)


def cartpole() -> rl.CartPole:
    env = rl.CartPole(2)
    env.reset(torch.arange(2))
    return env


method(cartpole, "reset", seeds=lambda: torch.arange(2))
method(cartpole, "step", actions=lambda: torch.zeros(2, dtype=torch.int64))
method(cartpole, "set_idle", mask=lambda: torch.tensor([True, False]))
method(cartpole, "load_state_dict", state=lambda: cartpole().state_dict())
call("ObservationNorm", rl.ObservationNorm, lambda n: n(torch.ones(2, n.size)), size=3)


def norm() -> rl.ObservationNorm:
    result = rl.ObservationNorm(3)
    result.update(torch.randn(5, 3))
    return result


method(norm, "forward", observations=lambda: torch.ones(2, 3))
method(norm, "update", observations=lambda: torch.ones(2, 3))
method(norm, "merge", other=norm)
method(norm, "affine")


def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 2))


def policies() -> PerturbedModel:
    pm = PerturbedModel(perturbed.convert(policy(), D), D)
    pm.set_noise()
    return pm


call("evaluate", rl.evaluate, policy=policy, env=lambda: rl.CartPole(2), episodes=2, max_steps=3)


def _rollout(kind: Any, **more: Any) -> Callable[[], tuple[Callable[..., Any], dict[str, Any]]]:
    def make() -> tuple[Callable[..., Any], dict[str, Any]]:
        pm = policies()
        return kind, {"policy": pm, "env": rl.CartPole(2 * D), "pm": pm, "max_steps": 3, **more}

    return make


TARGETS["rollout"] = Target(_rollout(rl.rollout))
TARGETS["Rollout"] = Target(_rollout(rl.Rollout), lambda r: r.run(2))


def runner() -> rl.Rollout:
    kind, arguments = _rollout(rl.Rollout)()
    return kind(**arguments)


method(runner, "episodes", count=1)
method(runner, "run", steps=1)
method(runner, "load_state_dict", state=lambda: runner().state_dict())

# ---- loops, files, processes ---------------------------------------------------------------------


def folder() -> Path:
    return Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))


def _train() -> tuple[Callable[..., Any], dict[str, Any]]:
    optimizer = nes()
    return perturbed.train, {
        "optimizer": optimizer, "closure": lambda: losses(optimizer.pm), "steps": 2
    }  # fmt: skip


TARGETS["train"] = Target(_train, list)
call("CSVLog", perturbed.CSVLog, path=lambda: folder() / "log.csv")
call("Progress", perturbed.Progress)
call(
    "save_checkpoint",
    lambda path, part: perturbed.save_checkpoint(path, part=part),
    path=lambda: folder() / "x",
    part=network,
)


def saved() -> Path:
    path = folder() / "checkpoint.pt"
    perturbed.save_checkpoint(path, part=network())
    return path


call(
    "load_checkpoint",
    lambda path, map_location: perturbed.load_checkpoint(
        path, map_location=map_location, part=network()
    ),
    path=saved,
    map_location="cpu",
)
call("read_checkpoint", perturbed.checkpoint.read_checkpoint, path=saved)
call(
    "Checkpoints",
    lambda folder, every, keep: perturbed.Checkpoints(
        folder, every=every, keep=keep, part=network()
    ),
    lambda c: c.save(1),
    folder=folder,
    every=1,
    keep=2,
)


def checkpoints() -> perturbed.Checkpoints:
    return perturbed.Checkpoints(folder(), part=network())


TARGETS["Checkpoints.after"] = Target(
    lambda: ((lambda step: checkpoints().after(step)), {"step": 1})
)
TARGETS["Checkpoints.save"] = Target(
    lambda: ((lambda steps: checkpoints().save(steps)), {"steps": 1})
)
call(
    "evaluate_one_by_one",
    perturbed.evaluate_one_by_one,
    function=lambda: losses_of,
    model=network,
    members=lambda: torch.ones(2, 21),
)
call(
    "WorkerPool",
    perturbed.WorkerPool,
    lambda p: p.close(),
    function=lambda: losses_of,
    model=network,
)
