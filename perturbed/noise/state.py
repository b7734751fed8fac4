"""Which noise is being drawn now: seed, generation, scale, and how rows map to members."""

from __future__ import annotations

import math
import secrets

import torch
from torch import Tensor

from .. import _C
from ..checks import as_int
from .turn import Turn


class NoiseState:
    """The draw that all perturbed layers of one model share.

    Seed, generation and scale reach the kernels in two small tensors per device that are updated in
    place, so ``torch.compile`` compiles once and a replayed CUDA graph draws what they hold then.
    For the same reason a forward reads no number here that changes from draw to draw.

    Attributes:
        population: independent draws of the whole population, over all processes and forwards.
        directions: D, those that a forward evaluates: all, unless :meth:`show` says otherwise.
        first_direction: global index of the first of them.
        antithetic: True, False, or None for "on where the number of repeats is even".
        seed: the user's seed.
        generation: number of the current draw, -1 before the first.
        drawn: whether there has been a draw since the seed was set.
        sigma: noise scale, the elementwise standard deviation of ``E_d``.
        active: whether the layers add their noise.
        released: whether another model has taken over one of the layers; this draw then serves
            nobody.
        held: noise of this draw that families with ``storage="stored"`` hold, by counter word:
            (D, rows, cols) without sigma.
        absolute: whether the layers' family is an absolute one, whose members are given and not
            drawn.
        explicit: what an absolute family's members are, by counter word: (D, rows, cols) views of
            ``members``; any stride between members.
        members: the tensors that were given for the whole population, by name of the parameter.
        turn: the block that a thread is in while it evaluates members or changes the draw.
    """

    def __init__(
        self,
        directions: int,
        antithetic: bool | None = None,
        sigma: float = 0.02,
        seed: int | None = 0,
    ) -> None:
        """Check and store the arguments; ``seed=None`` takes one from the operating system."""
        self.population = self.directions = check_directions(directions)
        if antithetic is not None and not isinstance(antithetic, bool):
            raise TypeError(f"antithetic must be True, False or None, got {antithetic!r}")
        self.antithetic = antithetic
        self.sigma = check_sigma(sigma)
        self.seed = check_seed(seed)
        self.generation = -1
        self.drawn = False
        self.first_direction = 0
        self.active = False
        self.turn = Turn()
        self.released = False
        # Row counts that a layer may see in the forward under way: None for any, () until the first
        # layer has seen one. Another number means rows in another order than ours.
        self.rows: tuple[int, ...] | None = None
        self.held: dict[int, Tensor] = {}
        self.absolute = False
        self.explicit: dict[int, Tensor] = {}
        self.members: dict[str, Tensor] = {}
        self._all_members: dict[int, Tensor] = {}  # explicit, without the window
        # Device -> key, sigma, and the key of noise that all directions share.
        self._tensors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __getstate__(self) -> dict:
        """Leave out what is rebuilt from the numbers or given, and the forward under way."""
        left_out: dict = {
            "_tensors": {}, "held": {}, "explicit": {}, "members": {}, "_all_members": {}
        }  # fmt: skip
        drawn = self.drawn and not self.absolute
        return {**self.__dict__, **left_out, "active": False, "rows": None, "drawn": drawn}

    # ---- the current draw ----------------------------------------------------------------------

    def next_generation(self, sigma: float | None = None) -> None:
        """Move on to fresh noise."""
        self.move(self.seed, self.generation + 1, self.sigma if sigma is None else sigma)

    def move(self, seed: int, generation: int, sigma: float) -> None:
        """Go to any draw; noise held of another one is dropped."""
        with self.turn.taken():
            seed, generation, sigma = check_draw(seed, generation, sigma)
            if (seed, generation) != (self.seed, self.generation):
                self.held.clear()
            before, sigma_before = self._key(), self.sigma
            self.seed, self.generation, self.sigma = seed, generation, sigma
            self.drawn = bool(self.explicit) if self.absolute else generation >= 0
            numbers = enumerate(zip(self._key()[:2], before[:2], strict=True))
            new = {i: value for i, (value, old) in numbers if value != old}
            for key, scale, shared in self._tensors.values():
                for i, value in new.items():
                    key[i].fill_(value)  # a fill needs no synchronisation
                    shared[i].fill_(value)
                if sigma != sigma_before:
                    scale.fill_(sigma)

    def show(self, first: int, count: int) -> None:
        """Make the rows of a forward those of ``count`` directions, from number ``first`` on.

        Noise held of other directions is dropped.
        """
        first, count = as_int("first", first), as_int("count", count)
        if first < 0 or count < 1 or first + count > self.population:
            raise ValueError(
                f"first and count must be directions of the population, 0 to "
                f"{self.population - 1}, got {count} from {first} on"
            )
        if (first, count) == (self.first_direction, self.directions):
            return
        with self.turn.taken():
            self.held.clear()
            self.first_direction, self.directions = first, count
            self._show_members()
            for key, _, _ in self._tensors.values():
                key[2].fill_(first)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``key`` ((3,) int64) and ``sigma`` (() float64) on ``device``."""
        made = self._tensors.get(device)
        return (self._make_tensors(device) if made is None else made)[:2]

    def shared_key(self, device: torch.device) -> Tensor:
        """Return the ``key`` of noise that all directions of the whole population share."""
        made = self._tensors.get(device)
        return (self._make_tensors(device) if made is None else made)[2]

    def _make_tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling():
            # Traced, the numbers would become constants of the graph. Not a decorator, which would
            # have every `import perturbed` wait a second for the import of torch's compiler.
            return torch.compiler.disable(self._new_tensors)(device)
        return self._new_tensors(device)

    def _new_tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        # Ordinary tensors, though the caller is in inference mode: they are updated in place later.
        with torch.inference_mode(False):
            key = torch.tensor(self._key(), dtype=torch.int64, device=device)
            sigma = torch.tensor(self.sigma, dtype=torch.float64, device=device)
            shared = torch.tensor([*self._key()[:2], 0], dtype=torch.int64, device=device)
        if type(key) is Tensor:  # not what a mode such as FakeTensorMode hands out
            self._tensors[device] = key, sigma, shared
        return key, sigma, shared

    def _key(self) -> list[int]:
        return [_C.splitmix64(self.seed), max(self.generation, 0), self.first_direction]

    @property
    def has_tensors(self) -> bool:
        """Whether the draw's tensors exist on some device."""
        return bool(self._tensors)

    def drop_memory(self) -> None:
        """Forget held noise, the device tensors and the members that were given."""
        with self.turn.taken():
            self.held.clear()
            self._tensors.clear()
            self.set_members({}, {})

    # Not in inference mode means with gradients, too: the views belong to the graph of the members.
    @torch.inference_mode(False)
    def _show_members(self) -> None:
        last = self.first_direction + self.directions
        self.explicit = {w: t[self.first_direction : last] for w, t in self._all_members.items()}

    def set_members(self, members: dict[str, Tensor], explicit: dict[int, Tensor]) -> None:
        """Hold the members of an absolute family, of the whole population; or none of them."""
        with self.turn.taken():
            self.members, self._all_members = members, explicit
            self._show_members()
            if self.absolute:
                self.drawn = bool(explicit)

    def undrawn(self) -> str:
        """Say what is missing while ``drawn`` is False."""
        if self.absolute:
            return (
                "no members have been given yet, or copying or freeing memory let them go: call "
                "set_members(), or ask() of the optimizer that moves them"
            )
        return "no noise has been drawn yet: call set_noise() first"

    # ---- rows and members ----------------------------------------------------------------------

    def repeats(self, rows: int) -> int:
        """Return R for a batch of ``rows`` rows, or say what is wrong with it."""
        d = self.directions
        if rows % d != 0:
            out = "lay them out as (R, D, ...) and pass x.flatten(0, 1)"
            if d != self.population:
                out = (
                    f"of the rows of all {self.population} directions, pm.window_rows(x) takes "
                    "those of the window"
                )
            raise ValueError(
                f"the batch must have R * D rows, D = {d} directions, got {rows} rows; {out}"
            )
        repeats = rows // d
        if repeats % 2 == 1 and (self.antithetic or (self.antithetic is None and repeats > 1)):
            raise ValueError(
                f"antithetic sampling needs an even number of repeats R, got R = {repeats} ({rows} "
                f"rows, D = {d} directions); pass x.flatten(0, 1) of an (R, D, ...) batch with "
                "even R, or antithetic=False"
            )
        return repeats

    def is_antithetic(self, repeats: int) -> bool:
        """Whether the second half of ``repeats`` uses -E_d."""
        return repeats > 1 and repeats % 2 == 0 if self.antithetic is None else self.antithetic

    def rows_of(self, rows: int) -> int:
        """Rows that an input of ``rows`` rows stands for in the forward under way.

        One row is shared by all: where everything else has B rows, it stands for B. That is
        unknown, and one row is one row, if the arguments of the forward do not agree on B.
        """
        if rows != 1 or not self.rows or (self.directions == 1 and 1 in self.rows):
            return rows
        others = [n for n in self.rows if n != 1]
        return others[0] if others and all(n == others[0] for n in others) else rows

    def enter_layer(self, rows: int) -> None:
        """Check the batch of a layer, of ``rows`` rows, that is about to add its noise."""
        if not self.drawn:
            raise RuntimeError(self.undrawn())
        self.repeats(rows)
        if self.rows is None:
            return
        if self.rows == ():
            self.rows = (rows,)
        # Not "rows not in self.rows", which torch.compile (2.13) traces wrongly for symbolic sizes.
        if all(rows != n for n in self.rows):
            raise ValueError(
                f"a layer got {rows} rows in a forward of {' or '.join(map(str, self.rows))}: rows "
                "must stay the first dimension throughout, (B, T, in) and not (B * T, in) or "
                f"(T, B, in), because row b belongs to direction b % {self.directions}"
            )


def check_directions(directions: int) -> int:
    """Return ``directions`` if it is a positive int."""
    directions = as_int("directions", directions)
    if not 0 < directions < 2**32:
        raise ValueError(f"directions must be between 1 and 2^32 - 1, got {directions}")
    return directions


def check_sigma(sigma: float) -> float:
    """Return ``sigma`` as a float if it is finite and not negative."""
    try:
        if isinstance(sigma, (str, bytes, bool)):  # float("1") would do
            raise TypeError
        value = float(sigma)
    except OverflowError:
        raise ValueError("sigma must be in the range of a float, got a larger integer") from None
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise TypeError(f"sigma must be a number, got {sigma!r}") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"sigma must be finite and at least 0, got {value}")
    return value


def check_draw(seed: int, generation: int, sigma: float) -> tuple[int, int, float]:
    """Return what names a draw, if there is such a one."""
    seed, sigma = as_seed(seed), check_sigma(sigma)
    generation = as_int("generation", generation)
    if not -1 <= generation < 2**63:
        raise ValueError(f"generation must be between -1 and 2^63 - 1, got {generation}")
    return seed, generation, sigma


def check_seed(seed: int | None) -> int:
    """Return ``seed``, or one from the operating system for None."""
    if seed is None:
        return secrets.randbits(63)
    return as_seed(seed)


def as_seed(seed: int, name: str = "seed") -> int:
    """Return a seed that is known, as that of a saved state: None is none."""
    seed = as_int(name, seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name} must fit in 64 bits, got {seed}")
    return seed
