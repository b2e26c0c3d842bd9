"""Input pipelines on Grain: deterministic, checkpointable, sharded by host.

The unit of the training pipeline is the batch: element i is the whole i-th batch, a pure function
of (seed, i). The order of the examples is the concatenation of one permutation of the split per
epoch, cut into batches of B; a batch may reach over the end of an epoch, and no example is dropped.
Or every batch takes each example by a coin of its own, as private training needs it.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from kd.data.sources import Batch, DataError, Source

# Threads that build batches ahead of the loop. One orders and gathers thousands of batches a second
# from memory; more would only fight over the interpreter lock, unless records are decoded.
_READ_THREADS = 1


def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` examples in `epoch`: int64 [size], from Philox keyed by (seed, epoch)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return rng.permutation(size)


class BatchIndices:
    """Endless random-access sequence: item i is this host's part of the i-th batch, int64 [B / H].

    With the order of the examples o = permutation of epoch 0, permutation of epoch 1, ..., the i-th
    global batch is o[i B : (i + 1) B], and host h of H takes its h-th contiguous part.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        host_index: int,
        host_count: int,
    ):
        self._size = size
        self._batch_size = batch_size
        self._first, self._count = _host_part(batch_size, host_index, host_count)
        # A batch touches two epochs at most; a prefetching thread may be one epoch ahead.
        self._order = functools.lru_cache(maxsize=4)(
            (lambda epoch: epoch_permutation(seed, epoch, size))
            if shuffle
            else (lambda epoch: np.arange(size))
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, item: int) -> np.ndarray:
        start = item * self._batch_size + self._first
        epoch, offset = divmod(start, self._size)
        head = self._order(epoch)[offset : offset + self._count]
        if len(head) == self._count:
            return head
        return np.concatenate([head, self._order(epoch + 1)[: self._count - len(head)]])


class CoinIndices:
    """Endless random-access sequence: item i is this host's part of the i-th batch by coins.

    Every batch takes each of the N examples with probability B / N, independent of the others and
    of other batches (Poisson sampling), into the first of its rows. The rest of the rows are
    padding, which repeats example 0. An item is (positions int64 [R / H], mask bool [R / H]).

    Of more examples than rows some are left out, by chance: `kd.theory.privacy.overflow` tells how
    rarely that happens. The batches are as secret as the seed is.

    Args:
      size: N.
      rows: R.
      expected: B.
      seed: with the number of the batch decides it.
      host_index, host_count: h and H, whose contiguous part of the rows is delivered.
    """

    def __init__(
        self, size: int, rows: int, expected: int, *, seed: int, host_index: int, host_count: int
    ):
        self._size, self._rows, self._rate, self._seed = size, rows, expected / size, seed
        self._first, self._count = _host_part(rows, host_index, host_count)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        # Three numbers, so that it is no epoch's order.
        sequence = np.random.SeedSequence([self._seed, item, 1])
        rng = np.random.Generator(np.random.Philox(sequence))
        # A number of heads, and which ones: the law of a coin for each.
        count = min(rng.binomial(self._size, self._rate), self._rows)
        positions = np.zeros(self._rows, np.int64)
        positions[:count] = rng.choice(self._size, count, replace=False)
        part = slice(self._first, self._first + self._count)
        return positions[part], (np.arange(self._rows) < count)[part]


def train_iterator(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    poisson: int = 0,
    shuffle: bool = True,
    host_index: int = 0,
    host_count: int = 1,
    prefetch: int = 16,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of batches, with `get_state` and `set_state`.

    Args:
      source: the split to iterate over.
      batch_size: examples of a global batch, B; at most the size of the split.
      seed: with the epoch's number, decides the epoch's order.
      poisson: B where batches are taken by coins, see `CoinIndices`: `batch_size` is the rows of a
        batch then, and batches have a bool `mask`, False on padding. 0 for the order of epochs.
      shuffle: False keeps the order of the split in every epoch.
      host_index: which of `host_count` contiguous parts of each global batch to deliver.
      host_count: number of hosts; divides `batch_size`.
      prefetch: batches prepared ahead by a thread; 0 prepares each when it is asked for.

    Returns:
      An iterator of dict batches as in `Source.fetch`, with B / host_count examples each. Its state
      is the number of batches delivered, {'next_index': int}, whatever was prefetched: JSON, or a
      Grain item of an Orbax checkpoint.

    Raises:
      DataError: a batch larger than the split, or not divisible by the hosts.
    """
    _check_batch(source, batch_size, host_count)
    if batch_size > len(source):
        raise DataError(
            f'batch_size={batch_size} exceeds the {len(source):,} examples of split '
            f'{source.split!r} of data set {source.name!r}; lower batch_size'
        )
    hosts = dict(host_index=host_index, host_count=host_count)
    indices: Any
    read: Callable[[Any], Batch]
    if poisson:
        indices = CoinIndices(len(source), batch_size, poisson, seed=seed, **hosts)
        read = functools.partial(_read_masked, source)
    else:
        indices = BatchIndices(len(source), batch_size, seed=seed, shuffle=shuffle, **hosts)
        read = source.fetch
    options = grain.ReadOptions(
        num_threads=_READ_THREADS if prefetch else 0, prefetch_buffer_size=prefetch
    )
    return iter(grain.MapDataset.source(indices).map(read).to_iter_dataset(options))


def eval_batches(
    source: Source, batch_size: int, *, host_index: int = 0, host_count: int = 1
) -> grain.MapDataset[Batch]:
    """The split once, in order, in batches of one shape; the last is padded and masked.

    Returns:
      A sequence of ceil(N / B) batches (`len`, index, or iterate): those of `Source.fetch` and
      'mask' bool [B / host_count], False on padding. Padding repeats the last example of the split.
      Each host gets its contiguous part of every global batch, so all hosts see equally many.

    Raises:
      DataError: a batch not divisible by the hosts.
    """
    _check_batch(source, batch_size, host_count)
    first, count = _host_part(batch_size, host_index, host_count)
    size = len(source)

    def read(batch: int) -> Batch:
        positions = batch * batch_size + first + np.arange(count)
        result = source.fetch(np.minimum(positions, size - 1))
        result['mask'] = positions < size
        return result

    return grain.MapDataset.range(-(-size // batch_size)).map(read)


def _read_masked(source: Source, item: tuple[np.ndarray, np.ndarray]) -> Batch:
    positions, mask = item
    return {**source.fetch(positions), 'mask': mask}


def _check_batch(source: Source, batch_size: int, host_count: int) -> None:
    if batch_size < 1 or batch_size % host_count:
        raise DataError(
            f'batch_size={batch_size} must be a positive multiple of the {host_count} host(s) that '
            f'read data set {source.name!r}'
        )


def _host_part(batch_size: int, host_index: int, host_count: int) -> tuple[int, int]:
    """First position and length of a host's contiguous part of a batch."""
    if not 0 <= host_index < host_count:
        raise DataError(f'host_index={host_index} must lie in 0..{host_count - 1}')
    count = batch_size // host_count
    return host_index * count, count
