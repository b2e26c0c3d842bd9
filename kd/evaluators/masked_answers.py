"""How often is an answer decoded by a masked diffusion model right, and in how many calls?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators.samples import check_weights
from kd.methods.discrete import common
from kd.methods.discrete.dparallel import prompt_length
from kd.network import Network
from kd.ranges import Count, NonNegative, Size
from kd.sampling import masked
from kd.state import State

# Thresholds of the entropy, in nats, over which the curves of calls and accuracy are drawn.
THRESHOLDS = (0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)


def masked_answers(
    context: Context,
    *,
    block: Count,
    limit: Count,
    thresholds: Sequence[NonNegative] = THRESHOLDS,
    examples: Count = 512,
    weights: str = 'final',
    shift: bool = False,
    mask: Size | None = None,
) -> Probe:
    """`exact_T`, the share of answers that are right in every symbol, and `calls_T` of the network
    a row, by threshold of the entropy; `exact_one` and `calls_one` of one position a call.

    Args:
      context: the stage; data as of `kd.methods.discrete.dparallel.certainty_forcing`.
      block: positions of a block.
      limit: positions of an answer.
      thresholds: nats.
      examples: of the split, from its beginning.
      weights: 'final' for the parameters, or the name of an average.
      shift, mask: as of `certainty_forcing`.

    Raises:
      UserError: answers for which a row has no room behind a prompt.
    """
    if limit >= (length := context.spec['input'].shape[0]):
        raise UserError(
            f'{context.stage}.evaluators: an answer of limit={limit} leaves no room for a prompt '
            f'in rows of {length} tokens.'
        )
    own = common.mask_of(context, context.network, 'network', mask)
    check_weights(context, weights)
    decode = decoder(context.network, own, block=block, limit=limit, shift=shift)

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float | Figure]:
        variables = state.variables(None if weights == 'final' else weights)
        parts: list[np.ndarray] = []
        for batch in batches:
            found = [decode(variables, batch, tau) for tau in (-1.0, *thresholds)]
            parts.append(np.asarray(found)[..., np.asarray(batch['mask'])])
            if sum(part.shape[-1] for part in parts) >= examples:
                break
        exact, calls = np.concatenate(parts, -1)[..., :examples].mean(-1).T
        names = ['one', *map(str, thresholds)]
        scalars: dict[str, float | Figure] = {}
        for name, right, count in zip(names, exact, calls, strict=True):
            scalars |= {f'exact_{name}': float(right), f'calls_{name}': float(count)}
        return scalars

    return Probe(run)


def decoder(
    network: Network, mask: int, *, block: int, limit: int, shift: bool = False
) -> Callable[..., jax.Array]:
    """`decode(variables, batch, threshold) -> float32 [2, B]`: whether each answer is right, and
    its calls. A negative threshold commits the least entropy of all, one position a call."""

    @jax.jit
    def decode(variables: Any, batch: Mapping[str, jax.Array], threshold: jax.Array) -> jax.Array:
        logits = masked.logits_function(network, variables, mask, shift=shift)
        first, tokens = prompt_length(batch), batch['input']
        said, calls = masked.decode(
            logits, tokens, first, mask=mask, block=block,
            rule=masked.entropy_below(threshold), limit=limit,
        )  # fmt: skip
        at = jnp.arange(tokens.shape[1])
        answer = (at >= first[:, None]) & (at < first[:, None] + limit)
        right = jnp.all((said == tokens) | ~answer, axis=-1)
        return jnp.stack([right.astype(jnp.float32), calls.astype(jnp.float32)])

    return decode


def calls_at(exact: np.ndarray, calls: np.ndarray, level: float, most: float) -> float:
    """The fewest calls with which at least `level` of the answers are right; `most` if none are.

    Args:
      exact, calls: [n], by threshold.
      level: in [0, 1].
      most: calls of one position a call.
    """
    enough = np.asarray(exact) >= level
    return float(np.min(np.asarray(calls)[enough])) if enough.any() else float(most)
