"""A decoder that answers prompts with a few tokens, and plain forward passes to hold it to."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from kd.claims import seeds
from kd.method import with_nonfinite_guard
from kd.models.decoder import Decoder
from kd.network import from_linen

V, P, R, G, EOS = 12, 5, 4, 4, 2
SHAPE = jax.ShapeDtypeStruct((1, P), jnp.int32)
SPEC = {
    'input': jax.ShapeDtypeStruct((P,), jnp.int32),
    'prompt_mask': jax.ShapeDtypeStruct((P,), bool),
}
SAMPLING = dict(group=G, max_new=R, stop=(EOS,), forbidden=(0, 1))


def verdicts(context):
    """1 where the first token is even; what a batch says of itself where it is forced; nothing of
    answers that begin with what it calls unreadable."""

    def reward(tokens, mask, batch):
        drawn = jnp.where(tokens[:, 0] % 2, 0.0, 1.0)
        drawn = jnp.where(tokens[:, 0] == batch['unreadable'], jnp.nan, drawn)
        return jnp.where(batch['forced'], batch['verdict'], drawn)

    return reward


REWARD = dict(name='answering.verdicts')


def decoder(**changes):
    made = dict(num_classes=V, width=16, depth=1, heads=2, mlp_hidden=24, max_length=32)
    return from_linen(Decoder(**{**made, **changes}), SHAPE)


def sharp(network, seed):
    """Variables far from where they start, so that laws are far from uniform."""
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(
            rng.normal(size=x.shape) * 0.3 if len(x.shape) > 1 else np.ones(x.shape), x.dtype
        ),
        abstract,
    )


def prompts():
    """Four prompts of different lengths."""
    rng = np.random.default_rng(0)
    mask = np.arange(P) >= P - np.array([P, 3, 1, 4])[:, None]
    tokens = np.where(mask, rng.integers(3, V, mask.shape), 0).astype(np.int32)
    return {
        'input': tokens,
        'prompt_mask': mask,
        'forced': np.zeros(4, bool),
        'verdict': np.zeros(4, np.float32),
        'unreadable': np.full(4, -1),
    }


def context(network, **fields):
    fields = {'optimizer': dict(name='sgd', lr=0.5), 'steps': 10, 'spec': SPEC, **fields}
    return seeds.context(network=network, batch_size=4, **fields)


def log_probs(network, variables, batch, temperature=1.0):
    """Of every answer [B, R], and entropies: rows that begin in their first slot, no mask."""
    rows, length = batch['tokens'].shape
    text = np.zeros((rows, batch['input'].shape[1] + length), np.int32)
    asked = batch['prompt_mask'].sum(1)
    for row in range(rows):
        said = batch['tokens'][row][batch['mask'][row]]
        whole = [*batch['input'][row][batch['prompt_mask'][row]], *said]
        text[row, : len(whole)] = whole
    logits = np.array(jax.jit(lambda t: network.apply(variables, t).logits)(text), np.float64)
    logits[..., :2] = -np.inf
    slots = asked[:, None] - 1 + np.arange(length)
    log_q = special.log_softmax(logits[np.arange(rows)[:, None], slots] / temperature, -1)
    chosen = np.take_along_axis(log_q, batch['tokens'][..., None], -1)[..., 0]
    entropy = special.entr(np.exp(log_q)).sum(-1)
    return np.where(batch['mask'], chosen, 0), np.where(batch['mask'], entropy, 0)


class Run:
    """A method of one step, compiled once: `build(context, reward=, sampling=, **options)`."""

    def __init__(self, build, network, reward=REWARD, *, fields=(), **options):
        made = build(context(network, **dict(fields)), reward=reward, sampling=SAMPLING, **options)
        self.network, self.method = network, with_nonfinite_guard(made, 'skip')
        self.first = jax.jit(self.method.init)(jax.random.key(0), {})
        self.step = jax.jit(self.method.step)

    def __call__(self, batch, seed=1, frozen=None):
        """The state before, that after, and metrics of a step from `sharp(seed)`."""
        state = self.first.replace(params={'network': sharp(self.network, seed)['params']})
        return state, *self.step(state.replace(frozen=frozen or {}), batch)


def forced(batch, verdict):
    return {**batch, 'forced': ~batch['forced'], 'verdict': np.full(4, verdict, np.float32)}


def value(metrics, name):
    total, count = metrics[name]
    return float(total / count)


def close(first, second, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), first, second)
