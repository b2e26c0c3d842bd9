"""Eight virtual CPU devices and a persistent compilation cache for every test."""

import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path

# A worker has one core. Threads of BLAS wait for one another by spinning, which costs an eigh of
# 64 x 64 fifty times its work; XLA's older emitters of loops compile in half of the time, and one
# piece of a program in three quarters of that of many. NumPy reads this where it is imported, XLA
# where it first computes, and what tests start as processes of their own inherits it.
os.environ['OPENBLAS_NUM_THREADS'] = os.environ['OMP_NUM_THREADS'] = '1'
os.environ['XLA_FLAGS'] = (
    '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 '
    + os.environ.get('XLA_FLAGS', '')
)

import budget
import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
# Bytes of a worker from which on it forgets after each test.
FULL = 1.6e9

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_compilation_cache_dir', str(ROOT / '.cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def pytest_configure(config):
    budget.register(config)


def pytest_collection_modifyitems(items):
    budget.longest_first(items)


def pytest_collection_finish():
    """What is imported by now stays: going through it again and again was a third of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope='module', autouse=True)
def forget_compiled_programs():
    """Else a worker keeps every program that it has compiled: 4 GB after half of the suite."""
    yield
    _forget()


@pytest.fixture(autouse=True)
def forget_when_full():
    """Within files of many programs, those of recipes and claims."""
    yield
    held = Path('/proc/self/statm')  # Of Linux alone.
    if held.exists() and int(held.read_text().split()[1]) * resource.getpagesize() > FULL:
        _forget()


def _forget():
    """What this leaves is mostly freed memory that glibc keeps: it is asked to give it back."""
    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), 'malloc_trim', None):
        trim(0)


@pytest.fixture(scope='session')
def quick_compilation():
    """A context of about half the compile time, where the speed of the result does not matter."""

    @contextlib.contextmanager
    def quick():
        jax.config.update('jax_disable_most_optimizations', True)
        try:
            yield
        finally:
            jax.config.update('jax_disable_most_optimizations', False)

    return quick


@pytest.fixture(scope='module')
def compiled_quickly(quick_compilation):
    """For a whole file: `pytestmark = pytest.mark.usefixtures('compiled_quickly')`.

    Not for one that says something of compiled programs, nor around `quick_compilation`.
    """
    with quick_compilation():
        yield


@pytest.fixture
def key():
    return jax.random.key(0)
