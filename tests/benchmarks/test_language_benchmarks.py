"""The benchmarks of language models start, say what they lack, and judge by their targets."""

import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

from kd import process
from kd.benchmarks import decode, distil_step, turns, weights
from kd.errors import UserError
from kd.losses import divergence

pytestmark = pytest.mark.usefixtures('compiled_quickly')

NO_PEERS = '--peers='


def test_decoding_is_measured_without_a_peer_and_without_weights(tmp_path, capsys):
    file = tmp_path / 'out.json'
    arguments = ['--weights=', NO_PEERS, '--rounds=1', '--new=2', f'--json={file}']
    assert decode.main(arguments) == 0
    told = capsys.readouterr().out
    assert 'SmolLM2 is left out: name its file by --weights or KD_SMOLLM2.' in told
    assert 'Ours alone: name a Python with the peers by --peers or KD_PEERS.' in told
    [case] = json.loads(file.read_text())['cases']
    assert case['work'] == 'toy, sampled, 128 x 2 tokens after 14'
    assert case['theirs'] == case['ratios'] == []
    assert f'| {case["ours"][0]:.1f} (' in told
    with pytest.raises(UserError, match="no case begins with 'x'"):
        decode.main(['--weights=', NO_PEERS, '--only=x'])


def test_a_python_without_the_peers_is_one_line(monkeypatch, capsys):
    arguments = ['--weights=', f'--peers={sys.executable}', '--rounds=1']
    monkeypatch.setattr(sys, 'argv', ['decode', *arguments])
    if importlib.util.find_spec('transformers'):
        pytest.skip('this Python has them')
    assert process.entry(decode.main) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("ModuleNotFoundError: No module named 'transformers'")
    )


class Side:
    """A worker that answers what it is given."""

    def __init__(self, seconds, tokens):
        self.seconds, self.tokens, self.asked = list(seconds), tokens, []

    def ask(self, name, **arguments):
        self.asked.append(arguments)
        return {'cpu_s': self.seconds.pop(0), 'tokens': self.tokens}


def test_greedy_answers_agree_up_to_the_first_token_that_differs():
    case = decode.Case('toy', 2, 3, 4, 0.0, 1.7)
    ours, theirs = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]]
    sides = {'kd': Side([9, 1, 1], ours), 'peer': Side([9, 2, 3], theirs)}
    compared, agreement = decode.measure(case, sides, 'folder', '', 2)
    assert agreement == 5 / 8
    assert compared.ours == [8, 8]
    assert compared.ratios() == [2, 3]
    assert sides['kd'].asked == sides['peer'].asked
    prompts = np.array(sides['kd'].asked[0]['prompts'])
    assert prompts.shape == (2, 3)
    assert decode.measure(
        case._replace(temperature=1.0), {'kd': Side([1, 1], ours)}, 'folder', '', 1
    ) == (turns.Comparison('toy, sampled, 2 x 4 tokens after 3', [8.0], [], 1.7), None)


def test_what_is_measured_is_the_step_of_the_recipe(tmp_path):
    """The loss is that of the decoder's own logits, over the second half of the rows."""
    small = distil_step.SMALL.clone(
        num_classes=40, width=16, depth=2, heads=2, kv_heads=1, mlp_hidden=24
    )
    directory = weights.write(tmp_path / 'teacher', small)
    module, variables = weights.read(directory)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 8)).tolist()
    distil_step.prepare(directory, [1], tokens, 4)
    found = [distil_step.step() for _ in range(2)]
    own = {'params': {**variables['params'], 'block0': variables['params']['block1']}}
    of_student = small.clone(depth=1)
    own['params'].pop('block1')
    given = np.asarray(tokens)
    ours, theirs = jax.jit(of_student.apply)(own, given), jax.jit(module.apply)(variables, given)
    wanted = divergence.generalized_jsd(ours[:, 3:-1], theirs[:, 3:-1], beta=0.5).mean()
    assert found[0]['loss'] == pytest.approx(float(wanted), rel=1e-4)
    assert found[1]['loss'] < found[0]['loss']
    assert all(each['cpu_s'] > 0 for each in found)


@pytest.mark.parametrize(
    ('speed', 'peak', 'loss', 'missed'),
    [(1.7, 80, 0.5, False), (1.5, 80, 0.5, True), (1.7, 95, 0.5, True), (1.7, 80, 0.501, True)],
)
def test_the_step_is_judged_by_speed_memory_and_loss(speed, peak, loss, missed):
    compared = turns.Comparison('', [speed], [1.0], distil_step.SPEED)
    peaks, losses = {'kd': peak, 'peer': 100}, {'kd': loss, 'peer': 0.5}
    assert distil_step.missed(compared, peaks, losses) == missed
    assert not distil_step.missed(turns.Comparison('', [1.0], [], 1.6), {'kd': 1}, {'kd': 1})
