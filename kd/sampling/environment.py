"""Episodes: a decoder acts, an environment answers, turn after turn, in one compiled loop.

    draw = sampler(decoder, max_new=1, only=(28, 29, 30, 31))
    said = Player(draw, environment).of(variables, batch, key)

A row is the prompt, and then of every turn what the environment shows, s tokens, and what the
policy says to it, A = `max_new` of the sampler: R = H (s + A) tokens of H turns. Those of the
policy are the `mask`; those of both are `there`, to be read and not to be learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kd.models.decoder import Decoder
from kd.sampling.autoregressive import Sampler


class Environment(NamedTuple):
    """A world that is a part of the compiled step; its state has a leading axis [B].

    Attributes:
      horizon: H, turns at most.
      start: `start(batch) -> state`, from the fields of the prompts.
      observe: `observe(state) -> int32 [B, s]`, what the policy is shown.
      act: `act(state, said int32 [B, A], mask bool [B, A]) -> state`; where nothing that the policy
        has said is an action, the state stays.
      over: `over(state) -> bool [B]`, the episodes that have come to their end.
    """

    horizon: int
    start: Callable[[Mapping[str, jax.Array]], Any]
    observe: Callable[[Any], jax.Array]
    act: Callable[[Any, jax.Array, jax.Array], Any]
    over: Callable[[Any], jax.Array]


class Episodes(NamedTuple):
    """What was said in a batch of episodes, as of `kd.sampling.autoregressive.Rollout`.

    Attributes:
      tokens: int32 [B, R]; 0 after the end.
      mask: bool [B, R], the tokens that the policy has said.
      log_probs: float32 [B, R], of these; 0 elsewhere.
      truncated: bool [B], the episodes that are not over after the last turn.
      there: bool [B, R], the tokens of the policy and of the environment.
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    truncated: jax.Array
    there: jax.Array


@dataclasses.dataclass(frozen=True)
class Player:
    """Plays episodes; in the place of a sampler, where answers are turns of an environment.

    Attributes:
      draw: what the policy says in a turn.
      environment: what it is said to.
    """

    draw: Sampler
    environment: Environment

    @property
    def decoder(self) -> Decoder:
        """The policy's."""
        return self.draw.decoder

    @property
    def temperature(self) -> float:
        """The policy's."""
        return self.draw.temperature

    @property
    def max_new(self) -> int:
        """Tokens of the policy in the longest episode."""
        return self.environment.horizon * self.draw.max_new

    def allowed(self, size: int) -> np.ndarray | None:
        """As of the sampler."""
        return self.draw.allowed(size)

    def turns(self, mask: jax.Array) -> jax.Array:
        """Tokens of each row that the loop goes through for episodes of this mask, bool [B, R]."""
        horizon = self.environment.horizon
        said = mask.reshape(mask.shape[0], horizon, -1)[..., -self.draw.max_new :]
        # Where nobody says anything the loop goes on all the same.
        return jnp.maximum(jax.vmap(self.draw.turns, in_axes=1)(said), 1).sum()

    def of(
        self,
        variables: Mapping[str, Any],
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        *,
        rows: jax.Array | None = None,
    ) -> Episodes:
        """An episode of each prompt. What a token costs does not grow with the turns before it.

        Args:
          variables: of the decoder.
          batch: `input`, `prompt_mask` [B, P], padded on the left, and the environment's fields.
          key: typed random key; turn t draws by fold_in(key, t), rows as of `Sampler`.
          rows: int [B], numbers of the rows; None for 0 .. B - 1.
        """
        draw, variables = self.draw.prepared(variables)
        world = self.environment
        state = world.start(batch)
        count, asked = batch['input'].shape
        shown = jax.eval_shape(world.observe, state).shape[1]
        cache = draw.start(count, asked + world.horizon * shown, turns=world.horizon)
        _, cache = draw.read(variables, cache, batch['input'], batch['prompt_mask'])

        def turn(carry, t):
            cache, (last, unread), state, over = carry
            there = jnp.broadcast_to(~over[:, None], (count, shown))
            heard = jnp.where(there, world.observe(state), 0)
            said, cache, left = draw.answer(
                variables, cache, jnp.concatenate([last, heard], 1),
                jnp.concatenate([unread, there], 1), jax.random.fold_in(key, t), rows=rows,
            )  # fmt: skip
            acted = world.act(state, said.tokens, said.mask)
            state = jax.tree.map(lambda new, old: _where(over, old, new), acted, state)
            made = (
                jnp.concatenate([heard, said.tokens], 1),
                jnp.concatenate([jnp.zeros_like(there), said.mask], 1),
                jnp.concatenate([jnp.zeros(heard.shape, said.log_probs.dtype), said.log_probs], 1),
                jnp.concatenate([there, said.mask], 1),
            )
            return (cache, left, state, over | world.over(state)), made

        nothing = jnp.zeros((count, 1), jnp.int32), jnp.zeros((count, 1), bool)
        carry = cache, nothing, state, world.over(state)
        (_, _, _, over), made = lax.scan(turn, carry, jnp.arange(world.horizon))
        tokens, mask, log_probs, there = (jnp.swapaxes(x, 0, 1).reshape(count, -1) for x in made)
        return Episodes(tokens, mask, log_probs, ~over, there)


# Who draws answers.
Draws = Sampler | Player


def _where(rows: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)
