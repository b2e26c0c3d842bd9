"""A run that samples what it learns from, killed for real: it goes on with equal bits."""

import os
import random
import signal
import time

import numpy as np
from runs import RECIPES, Command, arrays, metrics

CHAINS = str(RECIPES / 'chains.py')


def test_a_killed_policy_goes_on_with_the_answers_that_it_would_have_given(processes, tmp_path):
    whole, cut = (Command(processes, tmp_path / name, '24', config=CHAINS) for name in 'ab')
    assert whole.run() == 0, whole.said()
    rng, kills = random.Random(0), 0
    for _ in range(3):
        process = cut.start()
        target = cut.lines() + rng.randint(2, 6)
        while process.is_alive() and cut.lines() < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.02))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills >= 2
    assert cut.run() == 0, cut.said()
    assert 'resuming from step' in cut.said()
    ours, theirs = metrics(cut.workdir, 'student'), metrics(whole.workdir, 'student')
    assert ours == theirs
    # There was something to learn from, and it was clipped against the policy that answered.
    assert len({line['train/length'] for line in ours}) > 5
    assert sum(line['train/grad_norm'] > 0 for line in ours) > 12
    assert sum(line['train/clip_fraction'] for line in ours) > 0
    for item in ('variables', 'training'):
        a, b = (arrays(one.workdir, 'student', item) for one in (cut, whole))
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
