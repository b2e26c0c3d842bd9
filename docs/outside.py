"""Pages of JAX and its company, by the pattern of their addresses.

A build so needs no network, and no inventory of theirs.
"""

from __future__ import annotations

# How modules are called where they are imported.
ALIASES = {'jnp': 'jax.numpy', 'lax': 'jax.lax', 'nn': 'flax.linen', 'np': 'numpy'}
_JAX = 'https://docs.jax.dev/en/latest'
_LINEN = 'https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen'
_OPTAX = 'https://optax.readthedocs.io/en/latest/api'
_PYTHON = 'https://docs.python.org/3/library'
_NUMPY = 'https://numpy.org/doc/stable/reference'
# Names on pages of their own kind; what begins with them, longest first.
PLACES = {
    'jax.sharding.': f'{_JAX}/jax.sharding.html#{{}}',
    'jax.': f'{_JAX}/_autosummary/{{}}.html',
    'flax.linen.Module': f'{_LINEN}/module.html#{{}}',
    'flax.linen.': f'{_LINEN}/layers.html#{{}}',
    'flax.struct.': 'https://flax.readthedocs.io/en/latest/api_reference/flax.struct.html#{}',
    'optax.GradientTransformation': f'{_OPTAX}/transformations.html#{{}}',
    'optax.losses.': f'{_OPTAX}/losses.html#{{}}',
    'optax.': 'https://optax.readthedocs.io/en/latest/search.html?q={}',
    'numpy.random.': f'{_NUMPY}/random/generator.html#{{}}',
    'numpy.': f'{_NUMPY}/generated/{{}}.html',
    'pathlib.': f'{_PYTHON}/pathlib.html#{{}}',
    'collections.abc.': f'{_PYTHON}/collections.abc.html#{{}}',
    'typing.': f'{_PYTHON}/typing.html#{{}}',
    'argparse.': f'{_PYTHON}/argparse.html#{{}}',
}
# Names that sources import without their module.
SHORT = {
    'Array': 'jax.Array',
    'ArrayLike': 'jax.typing.ArrayLike',
    'DTypeLike': 'jax.typing.DTypeLike',
    'Mesh': 'jax.sharding.Mesh',
    'NamedSharding': 'jax.sharding.NamedSharding',
    'PartitionSpec': 'jax.sharding.PartitionSpec',
    'Path': 'pathlib.Path',
    **{
        name: f'collections.abc.{name}'
        for name in ('Callable', 'Hashable', 'Iterable', 'Iterator', 'Mapping', 'Sequence')
    },
    **{name: f'typing.{name}' for name in ('Any', 'Literal', 'NamedTuple', 'Protocol')},
}


def outside(name: str) -> str | None:
    """The address of something that another project documents; None where it is not known."""
    name = SHORT.get(name, name)
    first, dot, rest = name.partition('.')
    name = ALIASES.get(first, first) + dot + rest
    for begins, place in PLACES.items():
        if name.startswith(begins):
            return place.format(name)
    return None
