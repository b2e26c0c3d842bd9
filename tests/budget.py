"""Progress by file, and what each file costs: hooks of pytest, taken in by conftest.

A file is done by one worker from beginning to end (`--dist=loadfile`), which then forgets what it
has compiled. One line is printed per file; at the end come the slowest files, those over their
budget as a warning, and the memory of the largest worker.
"""

import os
import resource
import time
from collections import Counter, defaultdict

import pytest

# CPU seconds, of this process and its children, on an idle machine; a quarter more is a warning.
# New files that are longer want to be two, or smaller; those of before have what they take.
BUDGET = 15.0
ALLOWED: dict[str, float] = {
    'tests/aot/test_aot.py': 30.0,
    'tests/benchmarks/test_trajectory_benchmark.py': 18.0,
    'tests/claims/test_claims.py': 105.0,
    'tests/data/test_sources.py': 17.0,
    'tests/data/transforms/test_augment.py': 20.0,
    'tests/evaluators/test_compensated_set.py': 20.0,
    'tests/io/test_cache.py': 20.0,
    'tests/losses/test_every_loss.py': 25.0,
    'tests/losses/test_flow_map.py': 22.0,
    'tests/losses/test_sequence.py': 28.0,
    'tests/losses/test_signal.py': 17.0,
    'tests/losses/test_trajectory.py': 28.0,
    'tests/methods/test_dataset_methods.py': 105.0,
    'tests/methods/test_dataset_recipes.py': 50.0,
    'tests/methods/test_flow_methods.py': 47.0,
    'tests/methods/test_grpo.py': 23.0,
    'tests/methods/test_infer_recipe.py': 38.0,
    'tests/methods/test_infer_ufc.py': 33.0,
    'tests/models/test_flow_models.py': 43.0,
    'tests/models/test_vision_models.py': 32.0,
    'tests/test_colabs.py': 75.0,
    'tests/test_configs.py': 115.0,
    'tests/theory/test_verify.py': 35.0,
}
# What a worker may hold, in MB.
MEMORY = 2500.0
# Files that take longest, first, so that no worker is left with one at the end.
LONGEST: tuple[str, ...] = (
    'tests/claims/test_claims.py',
    'tests/training/test_reliability.py',
    'tests/test_configs.py',
    'tests/aot/test_aot.py',
    'tests/test_colabs.py',
    'tests/test_multihost.py',
    'tests/methods/test_flow_methods.py',
    'tests/methods/test_dataset_recipes.py',
    'tests/methods/test_dataset_methods.py',
    'tests/models/test_flow_models.py',
)


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


class Cost:
    """Stamps every report with the CPU seconds since the one before and the worker's memory."""

    def __init__(self) -> None:
        self.last = cpu_seconds()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self):
        outcome = yield
        now = cpu_seconds()
        report = outcome.get_result()
        report.cpu_s, self.last = now - self.last, now
        report.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Progress:
    """A line per file, and the table at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.plugins = config.pluginmanager
        self.began = time.monotonic()
        self.tests: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.failed: Counter[str] = Counter()
        self.peak = 0.0

    def expect(self, ids) -> None:
        if not self.tests:
            self.tests = Counter(name.partition('::')[0] for name in ids)
            self.left = self.tests.copy()

    def pytest_collection_finish(self, session) -> None:
        self.expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids) -> None:
        self.expect(ids)

    def pytest_report_teststatus(self, report):
        # No dots: a line per file says more.
        if report.passed and report.when == 'call':
            return 'passed', '', ''
        return None

    def pytest_runtest_logreport(self, report) -> None:
        file = report.nodeid.partition('::')[0]
        self.cpu[file] += getattr(report, 'cpu_s', 0.0)
        self.peak = max(self.peak, getattr(report, 'peak_mb', 0.0))
        self.failed[file] += report.failed
        if report.when != 'teardown':
            return
        self.left[file] -= 1
        if self.left[file]:
            return
        done = sum(self.tests.values()) - sum(self.left.values())
        share = 100 * done // max(sum(self.tests.values()), 1)
        told = f'{self.failed[file]} FAILED of {self.tests[file]}' if self.failed[file] else (
            f'{self.tests[file]} tests'
        )  # fmt: skip
        terminal = self.plugins.getplugin('terminalreporter')
        terminal.ensure_newline()
        terminal.write_line(
            f'[{share:3d} %, {time.monotonic() - self.began:4.0f} s] {file}: {told}, '
            f'{self.cpu[file]:.1f} s of CPU'
        )

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if len(self.cpu) < 2:
            return
        terminalreporter.section('CPU seconds by file')
        slowest = sorted(self.cpu.items(), key=lambda pair: -pair[1])
        for file, seconds in slowest[:12]:
            terminalreporter.write_line(f'{seconds:7.1f}  {file}')
        terminalreporter.write_line(
            f'{sum(self.cpu.values()):7.1f}  all {len(self.cpu)} files; the largest worker held '
            f'{self.peak:.0f} MB'
        )
        for file, seconds in slowest:
            allowed = ALLOWED.get(file, BUDGET)
            if seconds > 1.25 * allowed:
                terminalreporter.write_line(
                    f'WARNING: {file} took {seconds:.0f} s of CPU, its budget is {allowed:.0f} s',
                    yellow=True,
                )
        if self.peak > MEMORY:
            terminalreporter.write_line(
                f'WARNING: a worker held {self.peak:.0f} MB, more than {MEMORY:.0f}', yellow=True
            )


def register(config: pytest.Config) -> None:
    """Installs what this process needs: the stamps in workers, the lines where the user looks."""
    config.pluginmanager.register(Cost())
    if 'PYTEST_XDIST_WORKER' not in os.environ:
        config.pluginmanager.register(Progress(config))


def longest_first(items: list[pytest.Item]) -> None:
    """Orders tests by file, the longest files first, in place."""
    rank = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition('::')[0], len(rank)))
