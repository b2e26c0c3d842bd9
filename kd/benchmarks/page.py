"""What benchmarks tell, and the page that it is written to: `python -m kd.benchmarks --page`."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from kd import files
from kd.benchmarks.turns import Row
from kd.io import manifest

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scikit-learn')
HEAD = """# Performance

Ratios of kd to named peers, on the same work, weights and cores. Both sides take turns; a row is
the median over rounds of the ratio within a round, with its range. Peers that are no package are
written plainly by us, in `kd/benchmarks/plain`. Where it is known why a target is
missed, it stands below the table.

Written by `python -m kd.benchmarks --page`; every table says when, where and from which commit it
was measured, and names the command that measures it again.
"""
NO_DEVICE = (
    'Not measured: no accelerator was at hand. `launch/device_check.sh` measures it in eight '
    'minutes on one GPU, and `python -m kd.benchmarks --device=FILE --page` puts it here.'
)


def record(rows: Sequence[Row], command: str) -> dict[str, Any]:
    """The rows of a benchmark with when, where and of which commit they are, as JSON holds them."""
    return {
        'command': command,
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'commit': manifest.commit('kd')[:10],
        'machine': machine(),
        'packages': {name: metadata.version(name) for name in PACKAGES},
        'rows': [row._asdict() for row in rows],
    }


def machine() -> str:
    """Model and number of cores: 'AMD EPYC 9354, 2 cores, Python 3.12.1'."""
    file = Path('/proc/cpuinfo')
    told = re.search(r'model name\s*: (.*)', file.read_text()) if file.exists() else None
    name = told[1].strip() if told else platform.processor() or platform.machine()
    return f'{name}, {os.cpu_count()} cores, Python {platform.python_version()}'


def number(value: float) -> str:
    """With the digits that mean something: 0.0741, 0.95, 12.3, 860."""
    digits = next((d for bound, d in ((100, 0), (10, 1), (0.1, 2)) if value >= bound), 4)
    return f'{value:,.{digits}f}'


def table(rows: Sequence[Row]) -> str:
    """A line for each row, and then why some miss."""
    lines = [
        '| work | peer | ratio of | median (range) | rounds | target | |',
        '|---|---|---|---:|---:|---:|---|',
    ]
    reasons = []
    for row in rows:
        values = [number(f(row.ratios)) for f in (statistics.median, min, max)]
        target, verdict = '', ''
        if row.target == row.target:
            target = f'at {"least" if row.least else "most"} {row.target:g}'
            verdict = 'missed' if row.missed() else 'met'
        cells = [row.work, row.peer, row.of, f'{values[0]} ({values[1]}-{values[2]})']
        lines.append(f'| {" | ".join([*cells, str(len(row.ratios)), target, verdict])} |')
        if row.reason and row.missed():
            reasons.append(f'{row.work}, {row.of}: {row.reason}')
    return '\n'.join(lines + [f'\nMissed: {reason}' for reason in reasons])


def text(records: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """The page: a section for each benchmark, in the order of `titles`, and one for devices."""
    parts, absent = [HEAD], []
    for name, title in titles.items():
        if name not in records:
            absent.append(f'`{name}` ({title})')
            continue
        of = records[name]
        packages = ', '.join(f'{package} {version}' for package, version in of['packages'].items())
        parts.append(
            f'## {title[0].upper()}{title[1:]}\n\n'
            f'{table([Row(**row) for row in of["rows"]])}\n\n'
            f'`{of["command"]}`, {of["date"]}, commit {of["commit"]}; {of["machine"]}; '
            f'{packages}.\n'
        )
    parts.append(
        f'## On a GPU\n\n{records["device"]["text"] if "device" in records else NO_DEVICE}\n'
    )
    if absent:
        parts.append(f'Not measured yet: {", ".join(absent)}.\n')
    return '\n'.join(parts)


def write(page: Path, found: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> None:
    """Writes the page, and the numbers beside it as JSON; benchmarks not in `found` keep theirs."""
    numbers = page.with_suffix('.json')
    records = files.read_json(numbers, 'delete it') if numbers.exists() else {}
    records |= found
    files.write_json(numbers, records)
    files.write_whole(page, text(records, titles))
