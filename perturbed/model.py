"""PerturbedModel: a model, its population, and the estimate that comes back from it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attach
from .memory import is_out_of_memory, with_advice
from .nn.base import PerturbedLayer
from .nn.convert import revert
from .nn.cost import count_multiply_adds, multiply_adds
from .nn.fused import without_fused_layers
from .nn.report import conversion_report, format_table
from .nn.survey import slot_parameters
from .noise.explicit import check_members
from .noise.state import NoiseState, as_int, check_seed
from .replicate import Replicated, replicate_rows

# Parameter by id, the layer that uses it first, and its name there.
Uses = dict[int, tuple[nn.Parameter, tuple[PerturbedLayer, str]]]


class PerturbedModel(nn.Module):
    """Evaluate a population of perturbed copies of ``model`` in one forward.

    ``pm(x)`` and ``pm.any_method(x)`` run the base model with noise; ``model(x)`` stays
    unperturbed. Rows of the batch map to members as ``docs/conventions.md`` says: row b has
    direction ``b % D`` and repeat ``b // D``, and the second half of the repeats is negated if the
    sampling is antithetic.

    The wrapper owns the draw (seed, generation, sigma), not the noise, which is drawn again
    wherever it is needed; the global random state is never read or written. Where a name exists
    here and on the base model, this class wins; ``pm.model`` is the base model. After NESgpu's
    class of the same name (Amand, 2020).

    Every ``set_noise`` looks at the model anew: parameters with ``requires_grad=False`` are not
    perturbed and get no gradient, and a parameter that several layers share is perturbed once,
    alike in all.

    With :class:`~perturbed.Explicit` layers the members are tensors that :meth:`set_members` is
    given: there is no draw, no sign, and sigma has no meaning.

    Args:
        model: a module with perturbed layers (see :func:`perturbed.convert`). They leave the
            PerturbedModel they belong to, which then refuses to work.
        directions: D, the same for all of its layers.
        antithetic: None (default) pairs members where the number of repeats R is even and refuses
            an odd R > 1; True and False force it.
        sigma: noise scale, the standard deviation of every element of E_d.
        seed: of the noise; None takes one from the operating system.

    Raises:
        ValueError: no perturbed layer or none with a parameter to perturb, layers with other
            directions, a parameter shared by layers of different noise, layers of noise beside
            Explicit ones, ``antithetic=True`` with those, sigma negative or not finite.
        TypeError: arguments of another type.

    Example:
        >>> import torch, perturbed
        >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> losses = pm(pm.replicate(torch.ones(3, 8))).square().mean(-1)  # (S * n * D,)
        >>> plus, minus = pm.member_mean(losses)                           # (S, D)
        >>> pm.set_grad(plus - minus)
        >>> net.weight.grad.shape
        torch.Size([4, 8])
    """

    model: nn.Module
    _found: Uses | None = None  # what _perturbed() returned last

    def __init__(
        self,
        model: nn.Module,
        directions: int,
        antithetic: bool | None = None,
        sigma: float = 0.02,
        seed: int | None = 0,
    ) -> None:
        """Find the perturbed layers and give each parameter its stream."""
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if any(isinstance(m, PerturbedModel) for m in model.modules()):
            raise ValueError("model must not contain a PerturbedModel; pass its .model")
        self.state = NoiseState(directions, antithetic, sigma, seed)
        self.model = model
        self._attach()

    def _attach(self) -> None:
        """Look at the model anew: which parameters are perturbed, and what they draw from."""
        attach(self.model, self.state)
        self._found = None

    def layers(self) -> Iterator[PerturbedLayer]:
        """Iterate over the perturbed layers, in the order of ``model.modules()``."""
        return (m for m in self.model.modules() if isinstance(m, PerturbedLayer))

    # ---- evaluation ----------------------------------------------------------------------------

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Switch the noise on for a block; off again after it, whatever happens in it.

        In the block any call of the base model or of a part of it sees noise. Unlike ``pm(x)`` it
        does not know the batch, and so cannot refuse a model that folds other dimensions into the
        rows.
        """
        self._check_owner()
        if not self.state.has_tensors:  # after free_memory and unpickling
            self._make_tensors()
        before = self.state.active
        self.state.active = True
        try:
            with without_fused_layers():
                yield
        finally:
            self.state.active = before

    def _run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` with noise, holding its layers to the rows of its arguments."""
        state = self.state
        before = state.rows
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        state.rows = tuple(a.shape[0] for a in leaves if isinstance(a, Tensor) and a.dim() > 0)
        try:
            with self.perturbed():
                result = function(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise with_advice(error, self._advice()) from error
        finally:
            state.rows = before
        if inspect.isgenerator(result) or inspect.iscoroutine(result):
            result.close()
            raise TypeError(
                f"{getattr(function, '__name__', function)} returns a {type(result).__name__}, "
                "whose body would run after the noise is off; run it in `with pm.perturbed():`"
            )
        return result

    def _advice(self) -> str:
        """Say what would take less memory."""
        advice = (
            f"That was for {self.directions} directions; `with pm.window(first, count):` takes "
            "fewer at a time, as optimizers do with chunk= or max_memory=."
        )
        if any(getattr(layer.noise, "storage", "") == "stored" for layer in self.layers()):
            advice += (
                " Noise with storage='stored' is held for all of them; storage='regenerate' holds "
                "none."
            )
        return advice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model with noise; every row sees its own member.

        The rows of every layer must be those of an argument (of the first layer, if no argument
        holds a tensor): a model that folds other dimensions into the rows is refused.
        """
        return self._run(self.model, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Offer the base model's own attributes; its methods run with noise."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in self.__dict__:
                raise
        value = getattr(super().__getattr__("model"), name)
        if not callable(value) or isinstance(value, (nn.Module, type)):
            return value
        return functools.wraps(value)(functools.partial(self._run, value))

    # ---- the draw ------------------------------------------------------------------------------

    @property
    def directions(self) -> int:
        """D: the directions that a forward evaluates; the whole population outside of windows."""
        return self.state.directions

    @property
    def population(self) -> int:
        """The number of directions of the whole population."""
        return self.state.population

    @property
    def first_direction(self) -> int:
        """Number of the first direction that a forward evaluates; 0 outside of windows."""
        return self.state.first_direction

    @contextmanager
    def window(self, first: int, count: int) -> Iterator[PerturbedModel]:
        """Evaluate, for a block, only ``count`` directions of the population, from ``first`` on.

        In it ``directions`` is ``count``, and forwards, ``replicate``, ``member_mean``,
        ``set_grad`` and ``member`` see these directions, each with the noise it has in the whole
        population. For populations that do not fit in memory or are spread over processes.

        Raises:
            ValueError: directions outside of the population.
            TypeError: numbers that are no integers.

        Example:
            >>> import torch, perturbed
            >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=16)
            >>> pm = perturbed.PerturbedModel(net, directions=16, antithetic=False)
            >>> pm.set_noise()
            >>> whole = pm(torch.ones(16, 8))
            >>> with pm.window(12, 4):
            ...     torch.allclose(pm(torch.ones(4, 8)), whole[12:])
            True
        """
        before = self.state.first_direction, self.state.directions
        self.state.show(first, count)
        try:
            yield self
        finally:
            self.state.show(*before)

    @property
    def sigma(self) -> float:
        """The noise scale."""
        return self.state.sigma

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self.state.seed

    def set_noise(self, sigma: float | None = None) -> None:
        """Draw fresh noise: move on to the next generation, with a new ``sigma`` if given.

        Raises:
            RuntimeError: a model whose members are given.
        """
        self._check_owner()
        if self.state.absolute:
            raise RuntimeError(
                "the members of this model are not drawn; give them to set_members()"
            )
        self._attach()
        self.state.next_generation(sigma)
        self._make_tensors()

    def set_seed(self, seed: int | None = None) -> None:
        """Start the sequence of draws of ``seed``; the next ``set_noise`` is its first.

        None takes a seed from the operating system.
        """
        self.state.move(check_seed(seed), -1, self.sigma)

    def set_noise_scale(self, sigma: float) -> None:
        """Change the scale of the current draw; its random numbers stay."""
        self.state.move(self.seed, self.state.generation, sigma)

    # Not in inference mode means with gradients, too: the views belong to the graph of the members.
    @torch.inference_mode(False)
    def set_members(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the members of a model whose layers have :class:`~perturbed.Explicit` noise.

        The tensors are held and not copied: what is written into them is what the next forward
        sees. Those that require grad get gradients from a backward through it. Members are not part
        of the ``state_dict``, of copies and of pickles, and ``free_memory`` and moves to another
        device or dtype let go of them.

        Args:
            tensors: (D, *shape) of every perturbed parameter, by its name in
                ``pm.model.named_parameters()``; entry d belongs to member d. Of the parameter's
                dtype and device, contiguous in a member, with any stride from one to the next.

        Raises:
            TypeError: no mapping from names to tensors.
            ValueError: a parameter that is missing or none of the perturbed ones, or a tensor of
                another shape, dtype, device or layout.
            RuntimeError: layers of other noise.

        Example:
            >>> import torch, perturbed
            >>> from perturbed import Explicit
            >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=3, noise=Explicit())
            >>> pm = perturbed.PerturbedModel(net, directions=3)
            >>> pm.set_members({"weight": torch.randn(3, 4, 8), "bias": torch.zeros(3, 4)})
            >>> pm(pm.replicate(torch.ones(5, 8))).shape  # (n * D, out)
            torch.Size([15, 4])
        """
        self._check_owner()
        if not self.state.absolute:
            raise RuntimeError(
                "set_members needs layers with noise=Explicit(); the members of this model are "
                "drawn by set_noise()"
            )
        # All that can fail comes first: refused members leave those that are held as they are.
        uses = [
            (layer, key, parameter)
            for layer in self.layers()
            for key, parameter in slot_parameters(layer).items()
            if parameter.requires_grad
        ]
        used = {id(parameter) for _, _, parameter in uses}
        wanted = {n: p for n, p in self.model.named_parameters() if id(p) in used}
        names = {id(p): name for name, p in wanted.items()}
        members = check_members(tensors, wanted, self.population)
        matrices = {}
        for layer, key, parameter in uses:
            name = names[id(parameter)]
            try:
                matrices[layer, key] = layer.member_matrices(key, members[name])
            except RuntimeError:
                raise ValueError(
                    f"tensors[{name!r}] must be contiguous in every member, got strides "
                    f"{members[name].stride()} for shape {tuple(members[name].shape)}"
                ) from None
        self._attach()
        explicit = {
            layer.perturbed_parameters()[key][1]: matrix
            for (layer, key), matrix in matrices.items()
        }
        self.state.set_members(members, explicit)
        self._make_tensors()

    def members(self) -> dict[str, Tensor]:
        """Return the tensors that :meth:`set_members` was given, by name: (D, *shape) each.

        Raises:
            RuntimeError: before ``set_members``.
        """
        self._need_noise("members")
        if not self.state.absolute:
            raise RuntimeError("members: those of this model are drawn; see member(d, sign)")
        return dict(self.state.members)

    def allocate_memory(self) -> None:
        """Hold now what ``storage="stored"`` families hold; they would do so at their first use.

        A forward under ``torch.compile`` does not count as a use: call this after ``set_noise``
        then.
        """
        self._need_noise("allocate_memory")
        try:
            for layer in self.layers():
                layer.allocate()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise with_advice(error, self._advice()) from error

    def free_memory(self) -> None:
        """Drop all noise and tensors that the draw holds; the next forward makes them again.

        Members that were given are let go, and the next forward asks for ``set_members``.
        """
        self.state.drop_memory()

    def _make_tensors(self) -> None:
        """Have the draw's tensors on every device of the model, ahead of a traced forward."""
        for device in {p.device for p, _ in self._perturbed().values()}:
            self.state.tensors(device)

    def _apply(self, fn: Callable, recurse: bool = True) -> PerturbedModel:
        """Follow a move to another device or dtype; held noise is drawn again there.

        Members that were given stay where they are, and are let go.
        """
        super()._apply(fn, recurse)
        self.state.drop_memory()
        self._make_tensors()
        return self

    def _check_owner(self) -> None:
        if self.state.released:
            raise RuntimeError(
                "the layers of this PerturbedModel were reverted or serve a newer PerturbedModel"
            )

    def _need_noise(self, what: str) -> None:
        self._check_owner()
        if not self.state.drawn:
            raise RuntimeError(f"{what}: {self.state.undrawn()}")

    # ---- the estimate --------------------------------------------------------------------------

    def _perturbed(self) -> Uses:
        """Each perturbed parameter once: id -> (parameter, (layer, name of its first use))."""
        known = self._found
        # Kept until the next look at the model, or until one of the parameters is another.
        if known is not None and all(
            id(layer._parameters.get(name)) == key for key, (_, (layer, name)) in known.items()
        ):
            return known
        found: Uses = {}
        for layer in self.layers():
            for name, (parameter, _) in layer.perturbed_parameters().items():
                found.setdefault(id(parameter), (parameter, (layer, name)))
        self._found = found
        return found

    # Out of inference mode, so that gradients and members are ordinary tensors anywhere.
    @torch.inference_mode(False)
    @torch.no_grad()
    def set_grad(self, weights: Tensor, accumulate: bool = False) -> None:
        """Set ``.grad`` of every perturbed parameter to ``sum_d weights[d] E_d``.

        E_d includes sigma; nothing is divided by D or sigma. With weights of a loss, gradient
        descent descends; with antithetic sampling pass the folded pair ``loss_plus - loss_minus``.

        Args:
            weights: (D,) floating point, on the parameters' device.
            accumulate: add to existing gradients instead of replacing them.

        Raises:
            TypeError: weights that are no floating-point tensor.
            ValueError: weights of another length or on another device.
            RuntimeError: before the first ``set_noise``.
        """
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weights must be a floating-point tensor of shape (D,), got {got}")
        if weights.shape != (self.directions,):
            raise ValueError(
                f"weights must have shape (D,) = ({self.directions},), got {tuple(weights.shape)}"
            )
        self._need_noise("set_grad")
        perturbed = self._perturbed()
        for parameter, _ in perturbed.values():
            if parameter.device != weights.device:
                raise ValueError(
                    f"weights must be on the parameters' device {parameter.device}, got "
                    f"{weights.device}"
                )
        for parameter, (layer, name) in perturbed.values():
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            grad = parameter.grad
            if grad is None or not grad.is_contiguous():
                fresh = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                grad = fresh if grad is None else fresh.copy_(grad)
            layer.add_estimate(name, grad, weights.to(wide).contiguous(), accumulate)
            parameter.grad = grad

    # ---- rows and members ----------------------------------------------------------------------

    @property
    def signs(self) -> int:
        """S of :meth:`replicate`: 2 with antithetic pairs, else 1."""
        return 1 if self.state.antithetic is False else 2

    def replicate(self, x: Tensor) -> Tensor:
        """Show every member the same n rows: (n, ...) -> (S * n * D, ...), without copying them.

        The result is a :class:`perturbed.Replicated`: the first perturbed layer computes the
        unperturbed product once for the n rows and each direction once for both signs.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of shape (n, ...), got {type(x).__name__}")
        if x.dim() == 0:
            raise ValueError("x must have shape (n, ...), got a tensor without dimensions")
        if isinstance(x, Replicated):
            x = x.full()
        if x.requires_grad and torch.is_grad_enabled():
            return replicate_rows(x, self.signs, self.directions)
        return Replicated(x.detach(), self.signs, self.directions)

    def window_rows(self, x: Tensor) -> Tensor:
        """Take the rows of the directions that a forward evaluates out of those of the population.

        For rows that are each member's own, in a closure that several forwards or processes call;
        what all members see comes from :meth:`replicate`.

        Args:
            x: (R * P, ...) for a population of P directions.

        Returns:
            (R * D, ...); ``x`` itself where all directions are evaluated.

        Raises:
            ValueError: rows that are no multiple of P.
            TypeError: no tensor.

        Example:
            >>> import torch, perturbed
            >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=6)
            >>> pm = perturbed.PerturbedModel(net, directions=6)
            >>> x = torch.arange(12).view(2, 6).flatten()  # R = 2
            >>> with pm.window(1, 2):
            ...     pm.window_rows(x)
            tensor([1, 2, 7, 8])
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of shape (R * P, ...), got {type(x).__name__}")
        population, first = self.population, self.first_direction
        if x.dim() == 0 or x.shape[0] % population != 0:
            raise ValueError(
                f"x must have R * P rows, P = {population} directions of the whole population, got "
                f"{tuple(x.shape)}"
            )
        if self.directions == population:
            return x
        if isinstance(x, Replicated):
            if x.directions == population:
                return Replicated(x.source, x.copies, self.directions)
            x = x.full()
        rows = x.unflatten(0, (-1, population))
        return rows[:, first : first + self.directions].flatten(0, 1)

    def member_mean(self, values: Tensor) -> Tensor:
        """Average what belongs to a member: (B, ...) row values -> (S, D) member values.

        S is 2 if the batch's repeats form antithetic pairs, else 1. Counts and booleans are
        averaged as floating-point numbers.

        Raises:
            TypeError: values that are no tensor.
            ValueError: rows that are no multiple of D, an odd R > 1 with antithetic sampling.
        """
        signs, repeats = self._check_rows(values)
        if not values.is_floating_point():
            values = values.to(torch.get_default_dtype())
        if values.dim() == 1 and repeats == signs:
            return values.reshape(signs, self.directions) + 0.0  # what a mean of one number does
        # In double precision, where the order of a sum, which follows from shapes, is not seen:
        # values of a member are then the same in forwards of fewer directions.
        wide = values.to(torch.float64)
        per_row = wide.flatten(1).mean(1) if values.dim() > 1 else wide
        members = per_row.reshape(signs, repeats // signs, self.directions).mean(1)
        return members.to(values.dtype)

    def member_rows(self, values: Tensor) -> Tensor:
        """Sort what belongs to a member: (B, ...) row values -> (S, D, n, ...), n = R / S.

        With the rows of :meth:`replicate`, entry [s, d, i] is of member (s, d) and row i of its
        input, so that the third dimension counts what all members saw alike (see
        :func:`perturbed.optim.group_zscore`). A view where that is possible.

        Raises:
            TypeError: values that are no tensor.
            ValueError: rows that are no multiple of D, an odd R > 1 with antithetic sampling.
        """
        signs, repeats = self._check_rows(values)
        rest = values.shape[1:]
        return values.reshape(signs, repeats // signs, self.directions, *rest).transpose(1, 2)

    def _check_rows(self, values: Tensor) -> tuple[int, int]:
        """Return S and R of values with one entry per row."""
        if not isinstance(values, Tensor):
            raise TypeError(
                f"values must be a tensor with one entry per row, got {type(values).__name__}"
            )
        if values.dim() == 0:
            raise ValueError("values must have one entry per row, got a tensor without dimensions")
        repeats = self.state.repeats(values.shape[0])
        return 2 if self.state.is_antithetic(repeats) else 1, repeats

    @torch.inference_mode(False)
    @torch.no_grad()
    def member(self, d: int, sign: int = 1) -> nn.Module:
        """Return the plain module that member (sign, d) is: a copy with weights ``W + sign E_d``.

        Where members are given, its weights are E_d, bit for bit.

        Raises:
            ValueError: a direction outside 0 .. D - 1, or a sign other than 1 and -1 (than 1, where
                members are given).
            TypeError: a direction that is no integer.
            RuntimeError: before the first ``set_noise``.
        """
        d = as_int("d", d)
        if not 0 <= d < self.directions:
            raise ValueError(f"d must be between 0 and {self.directions - 1}, got {d}")
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {sign!r}")
        self._need_noise("member")
        if self.state.absolute and sign != 1:
            raise ValueError("sign must be 1: members that are given have no other, got -1")
        plain = copy.deepcopy(self.model)
        copies = dict(zip(map(id, self.model.parameters()), plain.parameters(), strict=True))
        for key, (_, (layer, name)) in self._perturbed().items():
            noise = layer.parameter_noise(name, d, 1)[0]
            if self.state.absolute:
                copies[key].copy_(noise)
            else:
                copies[key].add_(noise * self.state.sigma, alpha=sign)
        return revert(plain)

    def summary(self, *args: Any, **kwargs: Any) -> str:
        """Return a table of the layers, and of what has parameters but no noise, with the reason.

        For each layer: family, perturbed parameters, bytes of noise held between forwards, and its
        share of the cost, which is its share of the multiply-adds of all perturbed layers' weights.
        Example inputs are needed to know how often each is used, in how many positions; without
        any, each weight is taken to be used once.

        Args:
            *args: example inputs of the base model, any number of rows; it runs on them once,
                unperturbed and in evaluation mode. Layers that are not called then, though they may
                have their weights read, say so.
            **kwargs: the same.
        """
        report = conversion_report(self.model)
        layers = [(n, m) for n, m in self.model.named_modules() if isinstance(m, PerturbedLayer)]
        if args or kwargs:
            cost = count_multiply_adds(self.model, args, kwargs)
        else:
            cost = {id(layer): multiply_adds(layer) for _, layer in layers}
        total = max(1, sum(cost.values()))
        rows = [("layer", "noise", "parameters", "noise bytes held", "cost")]
        for name, layer in layers:
            count = sum(p.numel() for p, _ in layer.perturbed_parameters().values())
            share = f"{cost[id(layer)] / total:.1%}" if id(layer) in cost else "not called"
            cells = repr(layer.noise), f"{count:,}", f"{layer.held_bytes():,}", share
            rows.append((name or type(layer).__name__, *cells))
        for entry in report.unperturbed:
            name = f"{entry.name}: {', '.join(entry.names)}"
            rows.append((name, f"none: {entry.why}", f"{entry.parameters:,}", "0", ""))
        count = sum(parameter.numel() for parameter, _ in self._perturbed().values())
        state = self.state
        held = sum(t.nbytes for t in (*state.held.values(), *state.members.values()))
        rows.append(("perturbed", "", f"{count:,}", f"{held:,}", ""))
        return format_table(rows)

    # ---- saving --------------------------------------------------------------------------------

    def get_extra_state(self) -> dict:
        """Part of ``state_dict``: the draw, so that a loaded model continues with its noise."""
        s = self.state
        return {"seed": s.seed, "generation": s.generation, "sigma": s.sigma}

    def set_extra_state(self, state: dict) -> None:
        """Restore :meth:`get_extra_state`."""
        self.state.move(state["seed"], state["generation"], state["sigma"])
