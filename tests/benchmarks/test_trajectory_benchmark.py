"""The benchmark starts, and its claim about memory holds at a small size."""

import re

import jax
import jax.numpy as jnp

from kd import network
from kd.benchmarks import trajectory
from kd.models import mlp


def test_exact_gradient_grows_by_a_parameter_vector_and_the_naive_one_by_more():
    image = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    net = network.from_linen(mlp.MLP(widths=(32,), num_classes=10), image)
    params = jax.jit(net.init)(jax.random.key(0))['params']
    images, labels = jnp.ones((100, 4, 4, 1)), jnp.arange(100) % 10
    problem = trajectory.Problem(net, params, params, images, labels)
    exact, naive = (trajectory.memory(problem, kind, (8, 16))[1][0] for kind in ('exact', 'naive'))
    assert exact <= 1.02  # alignment counts at this size
    assert naive > 5.0


def test_the_benchmark_starts_and_prints_its_verdict(capsys):
    arguments = '--depth 0 --pixels 4 --images-per-class 2 --timed-steps 2 --experts 2 --rounds 1'
    code = trajectory.main([*arguments.split(), '--lengths', '4', '8'])
    printed = capsys.readouterr().out
    number = r'(-?[\d.]+)'
    growth = {
        kind: float(re.search(rf'\| {kind} \| .* \| {number} \|', printed)[1])
        for kind in trajectory.KINDS
    }
    assert growth['exact'] <= 1.05
    assert abs(growth['TESLA']) < 0.05
    verdict = re.search(
        rf'growth {number} \(.*time {number} \(.*experts {number} \(.*: (met|missed)\.', printed
    )
    achieved = [float(x) for x in verdict.groups()[:3]]
    assert achieved[0] == growth['exact']
    met = achieved[0] <= 1.001 and achieved[1] <= 1.4 and achieved[2] >= 1.0
    assert (verdict[4] == 'met') == met == (code == 0)
