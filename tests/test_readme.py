"""What README and pages promise in passing: lines of Python run, commands do not clash."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import divergence
from kd.losses.signal import Dense

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
PAGES = [README, *(file.read_text() for file in sorted((ROOT / 'docs').glob('*.md')))]
LINES = re.findall(r'`(from kd\S* import [^`]*)`', README)


@pytest.mark.parametrize('line', LINES)
def test_a_line_of_python_runs_as_it_stands(line):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(3, 4)), rng.normal(size=(4, 5))
    student, teacher = hidden @ head, rng.normal(size=(3, 5))
    names = {
        'student': jnp.asarray(student),
        'teacher': jnp.asarray(teacher),
        'hidden': jnp.asarray(hidden),
        'head': jnp.asarray(head),
        'signal': Dense(jnp.asarray(teacher)),
    }
    imported, expression = line.split('; ')
    exec(imported, names)
    loss = eval(expression, names)
    temperature = 4.0 if 'temperature' in expression else 1.0
    expected = divergence.forward_kl(names['student'], names['teacher'], temperature=temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_there_are_such_lines():
    assert len(LINES) == 2


def test_no_work_directory_is_given_to_two_recipes():
    commands = re.findall(
        r'--config=(\S+)[^`]*?--workdir=(\S+?)(?=[\s`])([^`]*)',
        '\n'.join(PAGES).replace('\\\n', ''),
    )
    assert len(commands) >= 15
    given: dict[str, set[tuple]] = {}
    for config, workdir, rest in commands:
        given.setdefault(workdir, set()).add((config, *re.findall(r'--config\.\S+', rest)))
    assert {workdir: runs for workdir, runs in given.items() if len(runs) > 1} == {}
