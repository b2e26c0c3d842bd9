"""The benchmark starts, and its claim about memory holds at a small size."""

import re

from kd.benchmarks import trajectory


def test_the_benchmark_starts_and_its_verdict_follows_from_its_tables(capsys):
    arguments = '--depth 0 --pixels 4 --images-per-class 2 --timed-steps 2 --experts 2 --rounds 1'
    code = trajectory.main([*arguments.split(), '--lengths', '4', '8'])
    printed = capsys.readouterr().out
    number = r'(-?[\d.]+)'
    growth = {
        kind: float(re.search(rf'\| {kind} \| .* \| {number} \|', printed)[1])
        for kind in trajectory.KINDS
    }
    assert growth['exact'] <= 1.02  # alignment counts at this size
    assert abs(growth['TESLA']) < 0.02
    assert growth['naive'] > 3.0
    verdict = re.search(
        rf'growth {number} \(.*time {number} \(.*experts {number} \(.*: (met|missed)\.', printed
    )
    achieved = [float(x) for x in verdict.groups()[:3]]
    assert achieved[0] == growth['exact']
    assert (verdict[4] == 'met') == (code == 0)
    if min(abs(achieved[1] - 1.4), abs(achieved[2] - 1.0)) > 0.01:  # printed to two digits
        met = achieved[0] <= 1.001 and achieved[1] <= 1.4 and achieved[2] >= 1.0
        assert met == (code == 0)
