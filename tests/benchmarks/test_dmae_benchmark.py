"""The teacher of DMAE stops at its tap, on the patches that are seen."""

import pytest

from kd.benchmarks import dmae as benchmark


def test_the_command_finds_the_teacher_within_its_budget(capsys):
    """Traced at full scale; nothing is compiled."""
    assert benchmark.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('vit_l, 75% hidden')
    whole, released = (float(line.split(': ')[1].split(',')[0]) for line in lines[1:])
    # By hand: 18 of 24 blocks on 50 tokens; 24 D^2 N + 4 N^2 D operations a block, D = 1024, and a
    # decoder of 8 blocks of D = 512 on 197.
    block = lambda n, d: 24 * d**2 * n + 4 * n**2 * d  # noqa: E731
    taught, decoded = 18 * block(50, 1024), 8 * block(197, 512)
    assert whole == pytest.approx(taught / (24 * block(197, 1024) + decoded), rel=0.04)
    assert released == pytest.approx(taught / (24 * block(50, 1024) + decoded), rel=0.05)
