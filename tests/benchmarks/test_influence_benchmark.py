"""The benchmark starts, both forms agree, and its claim about memory holds at a small size."""

import re

from kd.benchmarks import influence


def test_the_benchmark_starts_and_its_verdict_follows_from_its_table(capsys):
    code = influence.main(['--count', '64', '--chunk', '8', '--width', '128', '--rounds', '1'])
    printed = capsys.readouterr().out
    assert float(re.search(r'differ by (\S+) at most', printed)[1]) < 1e-2
    memory, took = map(
        float, re.search(r'Memory ([\d.]+) / n .* time ([\d.]+) \(', printed).groups()
    )
    assert memory <= influence.VECTORS
    if abs(took - influence.TIME) > 0.01:  # Printed to two digits.
        assert (took < influence.TIME) == (code == 0)
