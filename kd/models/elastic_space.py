"""Spaces of architectures: what may be chosen in a network whose parts can be left out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd.errors import UserError

# Places of options, int32 [coordinates] by the name of the choice.
Architecture = Mapping[str, Any]
DEPTH = 'depth'


def module_of(architecture: Architecture) -> Any:
    """`jax.numpy` for an architecture of its arrays, `numpy` for one of numbers."""
    return jnp if any(isinstance(x, jax.Array) for x in architecture.values()) else np


@dataclasses.dataclass(frozen=True)
class Choice:
    """Coordinates that each take one of some options, independently.

    Attributes:
      options: from the smallest to the largest.
      coordinates: their number.
      allowed: places of the options that may be taken now.
    """

    options: tuple[float, ...]
    coordinates: int
    allowed: tuple[int, ...]

    @classmethod
    def of(cls, options: Sequence[float], coordinates: int) -> Choice:
        """All of some options, in any order."""
        ordered = tuple(sorted(set(options)))
        return cls(ordered, coordinates, tuple(range(len(ordered))))


@dataclasses.dataclass(frozen=True)
class Space:
    """Choices by name, and which blocks are there.

    Attributes:
      choices: (name, choice) pairs.
      blocks: of each block that can be left out (coordinate, least place): the coordinate of the
        choice 'depth' that decides, and from which of its options on the block is there.
      of_block: names of choices that have a coordinate for every block; those of blocks that are
        left out mean nothing.
      switches: further parts of the same form as `blocks`, about which nothing is chosen.
    """

    choices: tuple[tuple[str, Choice], ...]
    blocks: tuple[tuple[int, int], ...] = ()
    of_block: tuple[str, ...] = ()
    switches: tuple[tuple[int, int], ...] = ()

    def restrict(self, allowed: Mapping[str, Iterable[float]], where: str = 'space') -> Space:
        """The space in which some choices have only these options.

        Raises:
          UserError: there is no such choice or option.
        """
        known = dict(self.choices)
        for name, options in allowed.items():
            if name not in known:
                raise UserError(f"{where} has no choice '{name}', only {', '.join(known)}.")
            choice, wanted = known[name], tuple(options)
            missing = [value for value in wanted if value not in choice.options]
            if missing or not wanted:
                raise UserError(f'{where}.{name} must name some of {choice.options}, got {wanted}.')
            places = tuple(sorted(choice.options.index(value) for value in set(wanted)))
            known[name] = dataclasses.replace(choice, allowed=places)
        return dataclasses.replace(self, choices=tuple(known.items()))

    def sample(self, key: jax.Array) -> dict[str, jax.Array]:
        """Every coordinate evenly and independently of the others."""
        made = {}
        for i, (name, choice) in enumerate(self.choices):
            drawn = jax.random.randint(
                jax.random.fold_in(key, i), (choice.coordinates,), 0, len(choice.allowed)
            )
            made[name] = jnp.asarray(choice.allowed, jnp.int32)[drawn]
        return made

    def largest(self) -> dict[str, np.ndarray]:
        """The last option that is allowed, everywhere."""
        return self._everywhere(-1)

    def smallest(self) -> dict[str, np.ndarray]:
        """The first option that is allowed, everywhere."""
        return self._everywhere(0)

    def _everywhere(self, place: int) -> dict[str, np.ndarray]:
        return {
            name: np.full(choice.coordinates, choice.allowed[place], np.int32)
            for name, choice in self.choices
        }

    def there(self, architecture: Architecture) -> Any:
        """Which blocks an architecture has, bool [blocks]."""
        coordinate, least = np.array(self.blocks).reshape(-1, 2).T
        return architecture[DEPTH][coordinate] >= least

    def one_hot(self, architecture: Architecture) -> jax.Array:
        """float32 [features]: a coordinate is a row of its options, 0 for blocks left out.

        Architectures that are the same network have the same features.
        """
        rows = []
        for name, choice in self.choices:
            hot = jax.nn.one_hot(architecture[name], len(choice.options), dtype=jnp.float32)
            if name in self.of_block:
                hot = hot * self.there(architecture)[:, None]
            rows.append(hot.reshape(-1))
        return jnp.concatenate(rows)

    def count(self) -> int:
        """How many different networks there are."""
        per_block = math.prod(
            len(choice.allowed) for name, choice in self.choices if name in self.of_block
        )
        total = 1
        for name, choice in self.choices:
            if name == DEPTH:
                for coordinate in range(choice.coordinates):
                    # Depths that leave out the same parts are one.
                    found = {
                        tuple(
                            sum(place >= least for at, least in parts if at == coordinate)
                            for parts in (self.blocks, self.switches)
                        )
                        for place in choice.allowed
                    }
                    total *= sum(per_block**blocks for blocks, _ in found)
            elif name not in self.of_block:
                total *= len(choice.allowed) ** choice.coordinates
        return total

    def genes(self) -> list[int]:
        """Options of every coordinate, for `kd.search.evolution`."""
        return list(
            itertools.chain.from_iterable(
                [len(choice.allowed)] * choice.coordinates for _, choice in self.choices
            )
        )

    def architectures(self, genes: np.ndarray) -> dict[str, np.ndarray]:
        """Genes int [n, G] as architectures, int32 [n, coordinates] by name."""
        made, begin = {}, 0
        for name, choice in self.choices:
            end = begin + choice.coordinates
            made[name] = np.asarray(choice.allowed, np.int32)[genes[:, begin:end]]
            begin = end
        return made

    def describe(self, architecture: Architecture) -> str:
        """'width 0.8 1, depth 2, expansion 0.2 - 0.35', with - for blocks left out."""
        there = np.asarray(self.there(architecture))
        told = []
        for name, choice in self.choices:
            values = [f'{choice.options[i]:g}' for i in np.asarray(architecture[name])]
            if name in self.of_block:
                values = [v if here else '-' for v, here in zip(values, there, strict=True)]
            told.append(f'{name} {" ".join(values)}')
        return ', '.join(told)
