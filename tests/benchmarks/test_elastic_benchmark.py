"""The benchmark starts, both sides take the same step, and its verdict follows from its table."""

import json
import re

import jax
import numpy as np
import pytest

from kd.benchmarks import elastic as benchmark
from kd.models import elastic
from kd.networks import sliced

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def test_the_benchmark_starts_and_its_verdict_follows_from_its_table(capsys, tmp_path):
    cache = jax.config.jax_enable_compilation_cache
    file = tmp_path / 'numbers.json'
    arguments = f'--networks mlp --architectures 2 --rounds 1 --calls 2 --json={file}'
    try:
        code = benchmark.main(arguments.split())
    finally:
        jax.config.update('jax_enable_compilation_cache', cache)
    printed = capsys.readouterr().out
    numbers = json.loads(file.read_text())['mlp']
    row = re.search(r'\| mlp \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|.*\| ([\d.]+) \|', printed)
    assert float(row[3]) == round(numbers['each'] / numbers['one'], 1)
    assert numbers['step'] == numbers['masked'][0] / numbers['plain'][0]
    met = numbers['saved'] >= benchmark.SAVED and numbers['step'] <= benchmark.STEP
    assert (code == 0) == met
    assert ('met.' in printed) == met


def test_both_sides_take_the_same_step():
    network, variables, batch, unroll = benchmark.problem('mlp')
    arch = network.module.space().smallest()
    key = jax.random.key(0)
    masked = jax.jit(benchmark.step_of(network, unroll))(variables, batch, key, arch)
    small = sliced(network, arch)
    own = elastic.slice_variables(network, variables, arch)
    plain = jax.jit(benchmark.step_of(small, unroll))(own, batch, key, {})
    found = elastic.slice_variables(network, masked, arch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, plain)
