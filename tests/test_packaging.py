"""What is installed with kd, by platform."""

import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SETUP = Path(__file__).parent.parent / 'setup.py'


@pytest.mark.parametrize(
    ('machine', 'name'),
    [
        ('x86_64', 'tensorflow-cpu'),
        ('AMD64', 'tensorflow-cpu'),
        # Apple silicon and Linux on ARM, for which there is no wheel of tensorflow-cpu.
        ('arm64', 'tensorflow'),
        ('aarch64', 'tensorflow'),
    ],
)
def test_every_platform_gets_the_tensorflow_that_has_a_wheel_for_it(machine, name, monkeypatch):
    monkeypatch.setattr('setuptools.setup', lambda **_: None)
    requirements = map(Requirement, runpy.run_path(str(SETUP))['REQUIREMENTS'])
    taken = [
        each.name
        for each in requirements
        if each.marker is None or each.marker.evaluate({'platform_machine': machine})
    ]
    assert [each for each in taken if each in ('tensorflow', 'tensorflow-cpu')] == [name]
