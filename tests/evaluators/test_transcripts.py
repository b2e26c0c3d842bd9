"""Answers as text: the sampler's, each with its own reward and under its own prompt."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_decoders
from toy_decoders import EOS, P, R, V

from kd.claims import seeds
from kd.evaluators.transcripts import transcripts
from kd.sampling.autoregressive import sampler
from kd.state import State
from kd.text.table import table

pytestmark = pytest.mark.usefixtures('compiled_quickly')

G = 2
SYMBOLS = ('PAD', 'BOS', 'EOS', *'abcdefghi')


@pytest.fixture(scope='module')
def network():
    return toy_decoders.decoder()


@pytest.fixture(scope='module')
def state(network):
    return State.create(jax.random.key(0), toy_decoders.drawn(network, 1))


@pytest.fixture(scope='module')
def batches():
    """Two of them: the second row of the first is padding."""
    rng = np.random.default_rng(0)
    asked = rng.integers(3, V, (2, 3, P)).astype(np.int32)
    there = np.ones((2, 3, P), bool)
    there[0, 0, :2] = False
    index, mask = np.arange(6).reshape(2, 3), np.array([[1, 0, 1], [1, 1, 1]], bool)
    names = ('input', 'prompt_mask', 'index', 'mask')
    return [
        dict(zip(names, map(jnp.asarray, of), strict=True))
        for of in zip(asked, there, index, mask, strict=True)
    ]


def probed(network, state, batches, tokenizer=None, **options):
    spec = {
        'input': jax.ShapeDtypeStruct((P,), jnp.int32),
        'prompt_mask': jax.ShapeDtypeStruct((P,), bool),
    }
    context = seeds.context(
        network=network, spec=spec, source=lambda split: types.SimpleNamespace(tokenizer=tokenizer)
    )
    sampling = dict(group=G, max_new=R, stop=(EOS,), forbidden=(0, 1))
    reward = dict(name='toy_decoders.odd_first')
    made = transcripts(context, reward=reward, sampling=sampling, prompts=3, seed=5, **options)
    return made.run(state, iter(batches))


def test_prompts_of_two_batches_stand_with_their_own_answers_and_rewards(network, state, batches):
    first, second = batches
    asked, there = (
        np.concatenate([np.asarray(first[name])[[0, 2]], second[name][:1]])
        for name in ('input', 'prompt_mask')
    )
    draw = jax.jit(sampler(network.module, max_new=R, stop=(EOS,), forbidden=(0, 1)))
    said = draw(state.variables(), asked.repeat(G, 0), there.repeat(G, 0), jax.random.key(5))
    expected, rewards = [], []
    for prompt in range(3):
        words = [SYMBOLS[i] for i in asked[prompt][there[prompt]]]
        expected += [f'# Prompt {prompt + 1}', '', '    ' + ' '.join(words), '']
        for place in range(G):
            row = prompt * G + place
            tokens = np.asarray(said.tokens[row])[np.asarray(said.mask[row])]
            judged = tokens[0] != 4
            verdict = f'reward {tokens[0] % 2}' if judged else 'no verdict'
            rewards += [tokens[0] % 2] if judged else []
            cut = '' if tokens[-1] == EOS else ', cut off'
            expected += [f'Answer {place + 1}: {verdict}, {len(tokens)} tokens{cut}', '']
            expected += ['    ' + ' '.join(SYMBOLS[i] for i in tokens), '']
    found = probed(network, state, batches, symbols='test_transcripts.SYMBOLS')
    assert found['answers'].splitlines() == expected
    assert found['reward'] == pytest.approx(np.mean(rewards))
    assert len(set(rewards)) == 2
    by_tokenizer = probed(network, state, batches, tokenizer=table(SYMBOLS))
    assert by_tokenizer == found


def test_ids_stand_as_they_are_where_nobody_knows_their_text(network, state, batches):
    text = probed(network, state, batches)['answers'].splitlines()
    assert text[2] == '    ' + ' '.join(map(str, np.asarray(batches[0]['input'][0, 2:])))
