"""What is installed with kd is enough for all of it, and not older than setup.py says."""

import ast
import importlib
import pkgutil
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kd

SETUP = Path(__file__).parent.parent / 'setup.py'
DISTRIBUTIONS = metadata.packages_distributions()
# Required, since others import them without saying so.
OF_OTHERS = {'importlib-resources', 'tensorflow', 'tensorflow-cpu'}


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr('setuptools.setup', lambda **_: None)
    return runpy.run_path(str(SETUP))


@pytest.fixture
def requirements(told):
    return [Requirement(each) for each in told['REQUIREMENTS']]


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


def modules(node):
    """Those that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def imported(tree, *, nested):
    """Distributions that a module imports, at its top or inside of functions."""
    nodes = set(ast.walk(tree)) - set(tree.body) if nested else tree.body
    named = [name for node in nodes for name in modules(node)]
    roots = {name.partition('.')[0] for name in named} - set(sys.stdlib_module_names) - {'kd'}
    return {canonicalize_name(DISTRIBUTIONS.get(root, [root])[0]) for root in roots}


def test_what_is_imported_is_required_and_what_is_required_is_imported(told, requirements):
    trees = [ast.parse(file.read_text()) for file in Path(kd.__file__).parent.rglob('*.py')]
    top = set().union(*(imported(tree, nested=False) for tree in trees))
    inner = set().union(*(imported(tree, nested=True) for tree in trees))
    required = {canonicalize_name(each.name) for each in requirements}
    extra = {
        canonicalize_name(Requirement(e).name) for some in told['EXTRAS'].values() for e in some
    }
    assert top <= required
    assert inner <= required | extra
    assert required - OF_OTHERS <= top | inner


def test_every_module_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(kd.__path__, 'kd.')]
    assert len(names) > 150
    for name in names:
        if not name.endswith('.__main__'):
            importlib.import_module(name)
