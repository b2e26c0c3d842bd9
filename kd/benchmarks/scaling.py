"""How a step's memory, operations and communication grow, from programs that are only compiled.

    python -m kd.benchmarks.scaling                        prints all tables
    python -m kd.benchmarks.scaling devices batch          some of them
    python -m kd.benchmarks.scaling --page=docs/scaling.md writes them into the page

Tables, each beside a baseline or a prediction:

    chips       rates of the data sheets
    devices     data parallelism, the batch growing with the devices: bytes over bytes of the
                gradient
    fsdp        one batch over more devices: bytes of arguments over those of one device
    batch       temporaries over those of the smallest batch
    model       operations of a transformer over 6 T (12 l d^2 + V d + 2 l L d)
    vocabulary  temporaries of the fused divergence over those of whole logits
    roofline    of the full-scale recipes, from docs/aot.json: nothing is compiled

The others are compiled for virtual CPU devices, which takes two minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from kd import config as config_lib
from kd import process
from kd.aot import compile as aot
from kd.aot import hlo, topology
from kd.aot import table as aot_table
from kd.benchmarks import fused_divergence
from kd.data.builders import characters
from kd.network import parameter_count

ROOT = Path(__file__).resolve().parent.parent.parent
DIGITS, CHARACTERS = (
    f'{ROOT}/configs/vision/logit_kd.py:cpu',
    f'{ROOT}/configs/lm/recursive_meta_distillation.py:cpu',
)
DEVICES = (1, 2, 4, 8)


def devices() -> str:
    """Weak scaling: 64 examples a device, parameters on every device."""
    rows: list[list[Any]] = []
    for count in DEVICES:
        config = config_lib.load(DIGITS)
        config.student.batch_size = 64 * count
        report = aot.compile_stage(config, 'student', f'cpu:{count}')
        moved = hlo.totals(report.collectives)
        size = sum(size for _, size in moved.values())
        gradient = 4 * _parameters(config, 'student')
        rows.append(
            [
                count,
                64 * count,
                f'{report.flops / count:,.0f}',
                f'{report.peak:,}',
                ', '.join(f'{n} {kind}' for kind, (n, _) in moved.items()) or 'none',
                f'{size:,}',
                f'{size / gradient:.3f}',
                f'{2 * (count - 1) / count * size:,.0f}',
            ]
        )
    head = (
        'devices', 'batch', 'operations a device', 'peak bytes a device', 'collectives',
        'bytes reduced', 'over the gradient\'s', 'bytes sent, ring of n',
    )  # fmt: skip
    return table(head, rows)


def fsdp() -> str:
    """Strong scaling: 64 sequences, parameters, optimiser and teacher cut in n."""
    rows: list[list[Any]] = []
    whole = 0
    for count in DEVICES:
        config = config_lib.load(CHARACTERS)
        config.generation_1.batch_size = 64
        with config.unlocked():
            config.mesh = dict(data=1, fsdp=count, tensor=1)
            config.sharding = config.frozen_sharding = (('.*', 'fsdp'),)
        report = aot.compile_stage(config, 'generation_1', f'cpu:{count}')
        whole = whole or report.arguments
        moved = hlo.totals(report.collectives)
        gathered = moved.get('all-gather', (0, 0))[1]
        student, teacher = (4 * _parameters(config, s) for s in ('generation_1', 'teacher'))
        rows.append(
            [
                count,
                f'{report.arguments:,}',
                f'{report.arguments / whole:.3f}',
                f'{1 / count:.3f}',
                f'{report.temporaries:,}',
                f'{gathered:,}',
                f'{gathered / (student + teacher):.3f}',
                f'{moved.get("all-reduce", (0, 0))[1]:,}',
            ]
        )
    head = (
        'devices', 'argument bytes', 'over one device\'s', '1 / n', 'temporaries',
        'bytes gathered', 'over the parameters\'', 'bytes reduced',
    )  # fmt: skip
    return table(head, rows)


def batch() -> str:
    """One device, more sequences."""
    rows: list[list[Any]] = []
    first: aot.Report | None = None
    for size in (16, 32, 64, 128):
        config = config_lib.load(CHARACTERS)
        config.teacher.batch_size = size
        report = aot.compile_stage(config, 'teacher', 'cpu:1')
        first = first or report
        rows.append(
            [
                size,
                f'{report.arguments:,}',
                f'{report.temporaries:,}',
                f'{report.temporaries / first.temporaries:.2f}',
                f'{report.flops / first.flops:.2f}',
                f'{report.flops / report.traffic:.2f}',
            ]
        )
    head = (
        'batch', 'argument bytes', 'temporaries', 'over the first row\'s',
        'operations over the first row\'s', 'operations a byte',
    )  # fmt: skip
    return table(head, rows)


def model() -> str:
    """One device, 16 sequences, wider and deeper transformers."""
    rows: list[list[Any]] = []
    for depth, width in ((2, 48), (4, 48), (2, 96), (2, 192), (4, 192)):
        config = config_lib.load(CHARACTERS)
        config.teacher.network.update(depth=depth, width=width)
        report = aot.compile_stage(config, 'teacher', 'cpu:1')
        parameters = _parameters(config, 'teacher')
        length = characters.LENGTH
        products = 12 * depth * width**2 + len(characters.SYMBOLS) * width
        attention = 2 * depth * length * width
        predicted = 6 * (products + attention) * report.batch_size * length
        rows.append(
            [
                f'{depth} x {width}',
                f'{parameters:,}',
                f'{report.arguments / parameters / 4:.2f}',
                f'{report.temporaries:,}',
                f'{report.flops:.3g}',
                f'{report.flops / predicted:.3f}',
            ]
        )
    head = (
        'depth x width', 'parameters', 'arguments over the parameters', 'temporaries', 'operations',
        'over the formula\'s',
    )  # fmt: skip
    return table(head, rows)


def vocabulary() -> str:
    """4,096 tokens, width 1,024, float32, 256 tokens at a time; value and both gradients."""
    rows: list[list[Any]] = []
    for size in (8192, 16384, 32768, 65536, 131072):
        shapes = (4096, size, 1024, 'float32')
        found = fused_divergence.measure_memory('forward_kl', 256, *shapes)
        dense, fused = (found[form] for form in (fused_divergence.DENSE, fused_divergence.FUSED))
        logits = 4 * 4096 * size / 2**20
        rows.append(
            [
                f'{size:,}',
                f'{logits:,.0f}',
                f'{dense:,.0f}',
                f'{dense / logits:.2f}',
                f'{fused:,.0f}',
                f'{fused / dense:.3f}',
            ]
        )
    head = (
        'vocabulary', 'logits, MiB', 'whole logits, MiB', 'over the logits', 'fused, MiB',
        'fused over whole',
    )  # fmt: skip
    return table(head, rows)


def chips() -> str:
    """Rates of the data sheets, and operations for each byte that keep a chip busy."""
    rows = [
        [
            chip.name,
            f'{chip.memory / 2**30:.0f}',
            f'{chip.flops / 1e12:.0f}',
            f'{chip.bandwidth / 1e9:,.0f}',
            f'{chip.interconnect / 1e9:.0f}',
            f'{chip.flops / chip.bandwidth:.0f}',
            f'{chip.flops / chip.interconnect:,.0f}',
            f'{4 / 3 * chip.flops / chip.interconnect:,.0f}',
        ]
        for chip in topology.CHIPS.values()
    ]
    head = (
        'chip', 'memory, GiB', 'F, 10^12 / s', 'M, 10^9 / s', 'W, 10^9 / s', 'F / M', 'F / W',
        '4/3 F / W',
    )  # fmt: skip
    return table(head, rows)


def roofline() -> str:
    """Of the rows of docs/aot.md that compile: what bounds them, and the arithmetic in use."""
    kept = json.loads((ROOT / 'docs' / 'aot.json').read_text())
    rows: list[list[Any]] = []
    for row in aot_table.ROWS:
        for target in row.slices:
            told = kept.get(row.key(target), {})
            if 'stage' not in told or (report := aot.from_json(told)).refused:
                continue
            bound, seconds = report.bound()
            at_least = '≥ ' if report.effort < 0 else ''
            chip = report.chip
            assert chip is not None
            rows.append(
                [
                    row.label(),
                    target,
                    f'{report.batch_size / report.devices:.3g}',
                    f'{at_least}{report.flops / report.devices / max(report.traffic, 1):.3g}',
                    f'{chip.flops / chip.bandwidth:.0f}',
                    bound,
                    f'{1e3 * seconds:.3g}',
                    f'{100 * report.times()["arithmetic"] / seconds:.3g} %',
                ]
            )
    head = (
        'recipe, stage', 'slice', 'examples a chip', 'operations a byte', 'balance', 'bound by',
        'step, ms, at least', 'of peak arithmetic, at most',
    )  # fmt: skip
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    'chips': chips,
    'devices': devices,
    'fsdp': fsdp,
    'batch': batch,
    'model': model,
    'vocabulary': vocabulary,
    'roofline': roofline,
}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; columns of numbers are set to the right."""
    sides = [
        '---:' if all(str(row[i]).removeprefix('≥ ')[:1].isdigit() for row in rows) else '---'
        for i in range(len(head))
    ]
    lines = [head, sides, *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


def written(page: str, tables: dict[str, str]) -> str:
    """A page with the text between `<!-- NAME: begin -->` and `<!-- NAME: end -->` replaced.

    Raises:
      ValueError: a table for which the page has no place.
    """
    for name, text in tables.items():
        begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
        place = re.compile(f'{begin}.*?{end}', re.DOTALL)
        if not place.search(page):
            raise ValueError(f'The page has no {begin} ... {end}.')
        before, after = place.split(page, maxsplit=1)
        page = f'{before}{begin}\n{text}\n{end}{after}'
    return page


def _parameters(config: config_lib.ConfigDict, stage: str) -> int:
    """Numbers that a stage trains."""
    from kd.parallel import mesh
    from kd.training.stage import prepare

    ready = prepare(config_lib.parse(config), stage, mesh.make_mesh({'data': 1}))
    return parameter_count(ready.abstract_state().variables())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.benchmarks.scaling', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('names', nargs='*', metavar='TABLE', help=', '.join(TABLES))
    parser.add_argument('--page', type=process.file_argument, help='write them into it')
    arguments = parser.parse_args(argv)
    names = arguments.names or list(TABLES)
    if unknown := set(names) - set(TABLES):
        parser.error(f'no table {", ".join(sorted(unknown))}; there are {", ".join(TABLES)}')
    if arguments.page:
        # Before minutes of compilation: does the page have a place for every table?
        try:
            written(arguments.page.read_text(), dict.fromkeys(names, ''))
        except (OSError, ValueError) as error:
            parser.error(f'--page={arguments.page}: {error}')
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', max(DEVICES))
    for name in names:
        text = TABLES[name]()
        print(f'{name}\n\n{text}\n', flush=True)
        if arguments.page:
            arguments.page.write_text(written(arguments.page.read_text(), {name: text}))
    return 0


if __name__ == '__main__':
    process.command(main)
