"""Sets of items that occur together often, exactly."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import TypeVar

from kd.errors import UserError

Item = TypeVar('Item', bound=Hashable)


def frequent_sets(
    transactions: Sequence[Collection[Item]],
    support: int,
    *,
    max_size: int = 0,
    most: int = 100_000,
) -> dict[frozenset[Item], int]:
    """{S: how many transactions contain S} of every non-empty set in at least `support` of them.

    Depth first over sets of transactions as bits (Eclat): those of S and i are those of S that
    contain i. A set counts a transaction once, however often an item is repeated in it.

    Args:
      transactions: items of each.
      support: at least 1.
      max_size: of a set; 0 for any.
      most: sets; there may be exponentially many.

    Raises:
      ValueError: a support below 1.
      UserError: more than `most` sets.
    """
    if support < 1:
        raise ValueError(f'A set in no transaction is no finding: support={support}.')
    holds: dict[Item, int] = {}
    for number, items in enumerate(transactions):
        for item in set(items):
            holds[item] = holds.get(item, 0) | 1 << number
    # Rare ones first: their sets die young.
    ordered = sorted(
        ((bits, item) for item, bits in holds.items() if bits.bit_count() >= support),
        key=lambda one: one[0].bit_count(),
    )
    found: dict[frozenset[Item], int] = {}

    def extend(prefix: tuple[Item, ...], candidates: Sequence[tuple[int, Item]]) -> None:
        for place, (bits, item) in enumerate(candidates):
            chosen = (*prefix, item)
            found[frozenset(chosen)] = bits.bit_count()
            if len(found) > most:
                raise UserError(
                    f'more than {most:,} sets are in at least {support} of {len(transactions)} '
                    'transactions; raise the support, or lower max_size.'
                )
            if max_size and len(chosen) == max_size:
                continue
            both = [(bits & others, other) for others, other in candidates[place + 1 :]]
            extend(chosen, [one for one in both if one[0].bit_count() >= support])

    extend((), ordered)
    return found
