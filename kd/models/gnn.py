"""Message passing on padded graphs: GIN, GCN, GraphSAGE and GAT (fields of `kd.data.graphs`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count, Fraction

# Nodes times edges of a graph up to which a matrix of them gathers and sums: many times faster than
# indices on TPU, and on CPU, where XLA goes through indices one by one.
DENSE = 1 << 17
KINDS, POOLS = ('gin', 'gcn', 'sage', 'gat'), ('sum', 'mean')


class GNN(nn.Module):
    """Labels embedded, layers of message passing, the roots pooled, a linear head.

    With h of the node, and m_u = h_u of the nodes it hears or, where edges have labels,
    relu(h_u + e), a layer is

        gin    MLP((1 + eps) h + sum m_u)                                       arXiv 1810.00826
        gcn    W (h / (d + 1) + sum m_u / sqrt((d + 1) (d_u + 1))) + b          arXiv 1609.02907
        sage   W h + V mean m_u + b                                             arXiv 1706.02216
        gat    concat_k [a_0 W_k h + sum a_u W_k m_u] + b                       arXiv 1710.10903
               a = softmax over itself and all u of leaky_relu(l_k W_k h + r_k W_k m_u; .2)

    with a ReLU and dropout behind it, but for the last layer. An edge that is there twice is heard
    twice. d is the field `degree` and not counted, so that a forest in which leaves hear nobody
    gives a root what it has in its graph.

    Attributes:
      columns: labels that there are in each column of `input`.
      edge_columns: the same of edges.
      kind: one of `KINDS`.
      width: of all layers.
      depth: their number.
      pool: of the roots, 'sum' or 'mean'.
      dropout: rate, after every layer but the last.
      heads: of gat; they share the width.
      num_classes: of logits.

    Features: `layer0`, ..., [B, n, width], and `features`, what the head gets.
    """

    columns: Sequence[Count] = (1,)
    edge_columns: Sequence[Count] = ()
    kind: str = 'gin'
    width: Count = 64
    depth: Count = 2
    pool: str = 'sum'
    dropout: Fraction = 0.0
    heads: Count = 1
    num_classes: Count = 2
    fields = ('input', 'edges', 'roots', 'degree')

    def __post_init__(self):
        layers.check_choice('kind', self.kind, KINDS)
        layers.check_choice('pool', self.pool, POOLS)
        if self.width % self.heads:
            raise ValueError(f'width={self.width} does not divide among heads={self.heads}.')
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        edges: jax.Array,
        roots: jax.Array,
        degree: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """int [B, n, F], int [B, m, 2 + E], bool [B, n], float [B, n] to [B, num_classes]."""
        h = Embedding(self.columns, self.width, name='node_labels')(x)
        wires = Wires(edges[..., 0], edges[..., 1], x.shape[1])
        for i in range(self.depth):
            e = None
            if edges.shape[-1] > 2:
                embedding = Embedding(self.edge_columns, self.width, name=f'edge_labels{i}')
                e = embedding(edges[..., 2:])
            h = Layer(self.kind, self.width, self.heads, name=f'layer{i}')(h, e, wires, degree)
            if i + 1 < self.depth:
                h = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(h))
        pooled = jnp.where(roots[..., None], h, 0).sum(1)
        if self.pool == 'mean':
            pooled = pooled / jnp.maximum(roots.sum(1), 1)[:, None]
        return layers.classifier(pooled, self.num_classes)


class Wires(NamedTuple):
    """Who hears whom.

    Attributes:
      to, of: int [B, m], the node that hears, and the one that is heard; `nodes` in `to` is none.
      nodes: n.
      dense: by matrices or by indices; None for what suits the size, see `DENSE`.
    """

    to: jax.Array
    of: jax.Array
    nodes: int
    dense: bool | None = None

    @property
    def there(self) -> jax.Array:
        """Which of them are edges, bool [B, m, 1]."""
        return (self.to < self.nodes)[..., None]

    def heard(self, x: jax.Array) -> jax.Array:
        """x [B, n, D] of those that are heard, [B, m, D]."""
        return self._gathered(x, self.of)

    def hearing(self, x: jax.Array) -> jax.Array:
        """x [B, n, D] of those that hear, [B, m, D]; anything where there is no edge."""
        return self._gathered(x, self.to)

    def sums(self, x: jax.Array) -> jax.Array:
        """Of what each node hears of x [B, m, D], [B, n, D]."""
        if self._by_matrix:
            return _exactly('bmn,bmd->bnd', self._one_hot(self.to), x)
        each = jax.vmap(lambda of, at: jax.ops.segment_sum(of, at, self.nodes + 1))
        return each(x, self.to)[:, : self.nodes]

    def maxima(self, x: jax.Array) -> jax.Array:
        """The same of the largest; -inf for nothing. Not to be differentiated."""
        x = jax.lax.stop_gradient(x)
        if self._by_matrix:
            at = self._one_hot(self.to)[..., None] > 0
            return jnp.where(at, x[:, :, None], -jnp.inf).max(1)
        each = jax.vmap(lambda of, at: jax.ops.segment_max(of, at, self.nodes + 1))
        return each(x, self.to)[:, : self.nodes]

    @property
    def _by_matrix(self) -> bool:
        small = self.nodes * self.to.shape[1] <= DENSE
        return small if self.dense is None else self.dense

    def _one_hot(self, rows: jax.Array) -> jax.Array:
        return jax.nn.one_hot(rows, self.nodes)

    def _gathered(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        if self._by_matrix:
            return _exactly('bmn,bnd->bmd', self._one_hot(rows), x)
        return jax.vmap(lambda of, at: of[at])(x, jnp.minimum(rows, self.nodes - 1))


class Layer(nn.Module):
    """One layer of message passing, see `GNN`."""

    kind: str
    width: int
    heads: int

    @nn.compact
    def __call__(
        self, h: jax.Array, e: jax.Array | None, wires: Wires, degree: jax.Array
    ) -> jax.Array:
        gathered = wires.heard(h)
        messages = gathered if e is None else nn.relu(gathered + e)
        if self.kind == 'gin':
            eps = self.param('eps', nn.initializers.zeros, ())
            summed = (1 + eps) * h + wires.sums(messages)
            hidden = nn.relu(nn.Dense(self.width, name='hidden')(summed))
            return nn.Dense(self.width, name='out')(hidden)
        if self.kind == 'gcn':
            scale = jax.lax.rsqrt(degree + 1)[..., None]
            summed = scale * wires.sums(messages * wires.heard(scale)) + scale**2 * h
            return nn.Dense(self.width, name='out')(summed)
        if self.kind == 'sage':
            count = wires.sums(wires.there.astype(h.dtype))
            average = wires.sums(messages) / jnp.maximum(count, 1)
            own = nn.Dense(self.width, name='own')(h)
            return own + nn.Dense(self.width, use_bias=False, name='heard')(average)
        return self._attention(h, messages, wires)

    def _attention(self, h: jax.Array, messages: jax.Array, wires: Wires) -> jax.Array:
        each = self.width // self.heads
        dense = nn.Dense(self.width, use_bias=False, name='values')
        own, heard = (dense(x).reshape(*x.shape[:2], self.heads, each) for x in (h, messages))
        left, right = (
            self.param(name, nn.initializers.lecun_normal(), (self.heads, each))
            for name in ('left', 'right')
        )
        ours = (own * left).sum(-1)
        itself = nn.leaky_relu(ours + (own * right).sum(-1), 0.2)
        score = nn.leaky_relu(wires.hearing(ours) + (heard * right).sum(-1), 0.2)
        # The largest cancels; what is no edge has no gradient.
        largest = jnp.maximum(itself, wires.maxima(jnp.where(wires.there, score, -jnp.inf)))
        largest = jax.lax.stop_gradient(largest)
        above = jnp.where(wires.there, score - wires.hearing(largest), 0)
        weight = jnp.where(wires.there, jnp.exp(above), 0)
        alone = jnp.exp(itself - largest)
        values = (weight[..., None] * heard).reshape(*heard.shape[:2], self.width)
        summed = wires.sums(values).reshape(own.shape) + alone[..., None] * own
        total = alone + wires.sums(weight)
        mixed = (summed / total[..., None]).reshape(h.shape)
        return mixed + self.param('bias', nn.initializers.zeros, (self.width,))


def _exactly(subscripts: str, matrix: jax.Array, x: jax.Array) -> jax.Array:
    """A product with a matrix of zeros and ones that rounds no value of x."""
    return jnp.einsum(subscripts, matrix, x, precision='highest')


class Embedding(nn.Module):
    """The sum over columns of an embedding each, labels int [B, k, F] to [B, k, width].

    As a product with ones and zeros, whose gradient is a product too.
    """

    columns: Sequence[int]
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != len(self.columns):
            raise ValueError(
                f'the data have {x.shape[-1]} columns of labels, and {self.name} declares '
                f'{len(self.columns)}.'
            )
        start = nn.initializers.normal(self.width**-0.5)
        table = self.param('table', start, (sum(self.columns), self.width))
        ones = [jax.nn.one_hot(x[..., i], count) for i, count in enumerate(self.columns)]
        return jnp.concatenate(ones, -1) @ table
