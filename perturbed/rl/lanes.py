"""Which member and which episode every lane of a rollout is at."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import PerturbedModel
from .seeds import add_word, as_seed

SEEDS = ("common", "pairs", "members")


class Lanes:
    """The lanes of a population: lane b is row b of the flat batch, direction ``b % D``.

    With R = lanes / D repeats and S signs, every member has n = R / S lanes. They take the member's
    episodes in turn: a lane that has finished one goes on with the next that nobody has begun.

    Args:
        lanes: B.
        pm: the population; None: one member has all lanes.
        seeds: "common": episode e of every member has the same seed; "pairs": of the two members of
            a direction; "members": all differ. Or the seeds themselves, int64, (E,) for all members
            or (S, D, E).
        device: of the lanes.

    Attributes:
        shape: (S, n, D).
        member: (lanes,) index into the members, s * D + d.
        episode: (lanes,) number of the episode that a lane is at.
        active: (lanes,) bool, whether it is at one of those asked for.
        first: number of their first direction in the population.

    Raises:
        ValueError: lanes that are no R * D, unknown seeds or seeds of another shape.
        TypeError: seeds that are neither a name nor int64.
    """

    def __init__(
        self, lanes: int, pm: PerturbedModel | None, seeds: str | Tensor, device: torch.device
    ) -> None:
        """Lay out members and lanes."""
        signs, directions = 1, 1
        if pm is not None:
            directions = pm.directions
            try:
                repeats = pm.state.repeats(lanes)
            except ValueError as error:
                part = (
                    f" (of the population's {pm.population}: a forward evaluates a chunk of them, "
                    "a process its share)"
                )
                raise ValueError(
                    f"env must have R * D lanes, D = {directions} directions"
                    f"{part if directions < pm.population else ''}, got lanes = {lanes} ({error})"
                ) from None
            signs = 2 if pm.state.is_antithetic(repeats) else 1
        self.shape = signs, lanes // (signs * directions), directions
        sign, slot, direction = (
            index.flatten()
            for index in torch.meshgrid(
                *(torch.arange(n, device=device) for n in self.shape), indexing="ij"
            )
        )
        self.member = sign * directions + direction
        self._slot = slot
        if isinstance(seeds, str):
            if seeds not in SEEDS:
                raise ValueError(f"seeds must be one of {SEEDS} or a tensor, got {seeds!r}")
            # Numbers in the whole population, of which pm may show a part; begin adds the first.
            population = 1 if pm is None else pm.population
            numbers = {"pairs": direction, "members": sign * population + direction}
            self._owner, self._given = numbers.get(seeds), None
        else:
            self._given = self._check_seeds(seeds).to(device)
        self._pm = pm
        # Of the episodes under way; see begin.
        self.first = 0
        self.generation = 0
        self._prefix = slot  # hash of all but the episode
        self.episodes: int | None = None
        self.episode = self.begun = slot
        self.active = torch.ones_like(slot, dtype=torch.bool)

    def _check_seeds(self, seeds: Tensor) -> Tensor:
        """Return seeds as (S * D, E)."""
        if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
            raise TypeError(f"seeds must be one of {SEEDS} or an int64 tensor, got {seeds!r}")
        signs, _, directions = self.shape
        if seeds.dim() == 1:
            return seeds.expand(signs * directions, -1)
        if seeds.dim() == 3 and seeds.shape[:2] == (signs, directions):
            return seeds.flatten(0, 1)
        raise ValueError(
            f"seeds must have shape (E,) or (S, D, E) = ({signs}, {directions}, E), got "
            f"{tuple(seeds.shape)}"
        )

    def begin(self, seed: int, generation: int, episodes: int | None) -> None:
        """Give every lane its first episode.

        Args:
            seed: what the episodes' seeds are made of.
            generation: the same.
            episodes: E, of each member; None: there is always another.
        """
        if self._given is not None and (episodes is None or episodes > self._given.shape[1]):
            raise ValueError(
                f"seeds must be one per episode, {'any number' if episodes is None else episodes}, "
                f"got {self._given.shape[1]}"
            )
        signs, n, directions = self.shape
        self.generation, self.episodes = generation, episodes
        self.first = 0 if self._pm is None else self._pm.state.first_direction
        if self._given is None:
            self._prefix = torch.zeros_like(self._slot)
            owner = 0 if self._owner is None else self._owner + self.first
            for word in (seed, generation, owner):
                self._prefix = add_word(self._prefix, word)
        self.episode = self._slot
        self.active = self._is_asked_for(self._slot)
        self.begun = torch.full((signs, 1, directions), n, device=self._slot.device)

    def _is_asked_for(self, episode: Tensor) -> Tensor:
        if self.episodes is None:
            return torch.ones_like(episode, dtype=torch.bool)
        return episode < self.episodes

    def go_on(self, done: Tensor) -> Tensor:
        """Move lanes that are done, (lanes,) bool, to their member's next episodes.

        Returns:
            (lanes,) bool: those that have one to start; others of them are active no more.
        """
        ends = done.view(self.shape).long()
        following = (self.begun + ends.cumsum(1) - ends).flatten()
        self.begun = self.begun + ends.sum(1, keepdim=True)
        self.episode = torch.where(done, following, self.episode)
        start = done & self._is_asked_for(following)
        self.active = torch.where(done, start, self.active)
        return start

    def seeds(self) -> Tensor:
        """Return the seeds of the episodes that the lanes are at, (lanes,) int64."""
        if self._given is not None:
            return self._given[self.member, self.episode.clamp(max=self._given.shape[1] - 1)]
        return as_seed(add_word(self._prefix, self.episode))

    def mean(self, values: Tensor) -> Tensor:
        """Average what belongs to a lane, (lanes,), over those of a member: (S, D)."""
        return values.view(self.shape).mean(1)
