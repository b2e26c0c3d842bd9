"""Launches a recipe, or a sweep of it, with XManager.

    python launch/xm_launch.py --config=configs/vision/logit_kd.py:cpu --workdir=runs/sweep \\
        --sweep='student.optimizer.lr=[1e-3, 3e-3]' --sweep='seed=[0, 1]'

Every combination of the sweeps' values is one work unit with a work directory of its own.
`--executor` says where: `local` runs them here with the Python that runs this; `vertex` and
`kubernetes` build the image of launch/Dockerfile and run it in the cloud, with, say,
`--accelerator=V100=8` or `TPU_V3=8`; several hosts join by `--distributed=auto`. `--dry_run` prints
what would be started.

Needs the extra: pip install -e '.[launch]' (not for `--dry_run`).
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments, rest = _parse(sys.argv[1:] if argv is None else argv)
    units = list(_units(arguments, rest))
    if arguments.dry_run:
        print(f'{len(units)} work unit(s) on {arguments.executor} {_resources(arguments)}'.rstrip())
        for unit in units:
            print(shlex.join(['python', '-m', 'kd.main', *unit]))
        return 0
    if importlib.util.find_spec('xmanager') is None:
        print("xm_launch: XManager is missing: pip install -e '.[launch]'", file=sys.stderr)
        return 2
    return asyncio.run(_launch(arguments, units))


def _units(arguments: argparse.Namespace, rest: Sequence[str]) -> Iterator[list[str]]:
    """The arguments of `kd.main` for each combination of the sweeps' values."""
    for values in itertools.product(*arguments.sweep.values()):
        chosen = dict(zip(arguments.sweep, values, strict=True))
        name = ','.join(f'{field.rpartition(".")[2]}={value}' for field, value in chosen.items())
        workdir = f'{arguments.workdir.rstrip("/")}/{name}' if name else arguments.workdir
        unit = [f'--config={arguments.config}', f'--workdir={workdir}']
        if arguments.hosts > 1:
            unit.append('--distributed=auto')
        yield [*unit, *(f'--config.{field}={value}' for field, value in chosen.items()), *rest]


async def _launch(arguments: argparse.Namespace, units: Sequence[list[str]]) -> int:
    """Hands the work units to XManager; local ones are waited for."""
    from absl import flags
    from xmanager import xm, xm_local

    flags.FLAGS([sys.argv[0]], known_only=True)
    try:
        # Leaving the experiment waits for its local work units, and raises if one fails.
        async with xm_local.create_experiment(f'kd {arguments.config}') as experiment:
            executor, packageable = _executor(arguments, xm, xm_local)
            [executable] = experiment.package([packageable])
            for unit in units:
                given = xm.SequentialArgs.from_collection(unit)
                await experiment.add(xm.Job(executable, executor, args=given))
    except RuntimeError as error:
        print(f'xm_launch: {error}', file=sys.stderr)
        return 1
    return 0


def _executor(arguments: argparse.Namespace, xm: Any, xm_local: Any) -> tuple[Any, Any]:
    """Where to run, and what."""
    if arguments.executor == 'local':
        executor = xm_local.Local()
        command = xm.SequentialArgs.from_collection(['-m', 'kd.main'])
        return executor, xm.binary(executor.Spec(), path=sys.executable, args=command)
    kinds = {'vertex': xm_local.Vertex, 'kubernetes': xm_local.Kubernetes}
    requirements = xm.JobRequirements(replicas=arguments.hosts, **_resources(arguments))
    executor = kinds[arguments.executor](requirements)
    dockerfile = str(ROOT / 'launch' / 'Dockerfile')
    return executor, xm.dockerfile_container(executor.Spec(), path=str(ROOT), dockerfile=dockerfile)


def _resources(arguments: argparse.Namespace) -> dict[str, int]:
    if not arguments.accelerator:
        return {}
    kind, _, count = arguments.accelerator.partition('=')
    return {kind: int(count or 1)}


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument('--config', required=True)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--executor', choices=('local', 'vertex', 'kubernetes'), default='local')
    parser.add_argument('--accelerator', default='', metavar='KIND=COUNT')
    parser.add_argument('--hosts', type=int, default=1)
    parser.add_argument('--sweep', action='append', default=[], metavar='FIELD=[...]')
    parser.add_argument('--dry_run', action='store_true')
    arguments, rest = parser.parse_known_args(argv)
    for argument in rest:
        if not argument.startswith(('--config.', '--data_dir=')):
            parser.error(f"unknown argument '{argument}'; fields are set by --config.FIELD=VALUE")
    for text in (arguments.workdir, *rest):
        if '://' in text:
            parser.error(f"'{text}' is an address: mount the bucket and name the folder")
    sweep = {}
    for text in arguments.sweep:
        field, _, values = text.partition('=')
        try:
            sweep[field] = list(ast.literal_eval(values))
        except (ValueError, SyntaxError, TypeError):
            parser.error(f"--sweep='{text}' must be FIELD=[VALUE, ...], a Python list")
    arguments.sweep = sweep
    return arguments, rest


if __name__ == '__main__':
    sys.exit(main())
