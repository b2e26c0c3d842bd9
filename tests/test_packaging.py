"""What is installed with kd is enough for all of it, and not older than setup.py says."""

import importlib
import pkgutil
import runpy
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kd

SETUP = Path(__file__).parent.parent / 'setup.py'


@pytest.fixture
def requirements(monkeypatch):
    monkeypatch.setattr('setuptools.setup', lambda **_: None)
    return [Requirement(each) for each in runpy.run_path(str(SETUP))['REQUIREMENTS']]


def needed(requirements, **platform):
    return [each for each in requirements if not each.marker or each.marker.evaluate(platform)]


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
def test_every_platform_gets_the_tensorflow_that_has_a_wheel_for_it(machine, name, requirements):
    taken = [each.name for each in needed(requirements, platform_machine=machine)]
    assert [each for each in taken if each in ('tensorflow', 'tensorflow-cpu')] == [name]


def test_what_is_installed_is_what_the_requirements_ask_for(requirements):
    taken = needed(requirements)
    assert {'jax', 'numpy', 'safetensors'} <= {each.name for each in taken}
    for each in taken:
        assert each.specifier.contains(metadata.version(each.name), prereleases=True), each
        # A lower bound, which `make test-lowest` holds, and no upper one.
        assert [clause.operator for clause in each.specifier] == ['>='], each


def test_every_module_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(kd.__path__, 'kd.')]
    assert len(names) > 150
    for name in names:
        if not name.endswith('.__main__'):
            importlib.import_module(name)
