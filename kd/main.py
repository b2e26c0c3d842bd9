"""Runs a recipe: `python -m kd.main --config=configs/vision/logit_kd.py:cpu --workdir=runs/mine`.

Every field of the config can be changed on the command line: `--config.student.steps=500`.
Running the same command again resumes, or says that all is done. Stages that are done are used as
they are while what they were made from is the same; `--stages=student` runs one alone,
`--again=student` begins it anew, `--longer=student` lets it go on to more steps.

Exit status: 0 done; 2 something to correct (config, data, work directory); 3 a loss became
non-finite; 75 stopped by SIGTERM or SIGHUP, run again to go on from the checkpoint that it wrote;
130 the same by Ctrl-C; 76 another process of the run has died.

On several hosts the same command runs on each with `--distributed=auto` (Slurm, TPU pods, Open MPI)
or `--distributed=HOST:PORT,COUNT,INDEX`; see launch/.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import files, process
from kd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ml_collections import ConfigDict

EXIT_USER, EXIT_NONFINITE = process.EXIT_USER, process.EXIT_NONFINITE
EXIT_PREEMPTED = process.EXIT_STOPPED
_PREFIX = '--config.'
_FLAGS = (
    *('--config', '--workdir', '--data_dir', '--distributed'),
    *('--stages', '--again', '--longer'),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. Errors meant for people become one line."""
    return process.entry(lambda: _main(argv))


def _main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format='%(message)s', level=logging.WARNING)
    # TensorFlow makes tfds copies, and would have much to say of itself.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    known, assignments = parse(sys.argv[1:] if argv is None else argv)
    # Importing takes seconds: a mistyped flag is told before, and a signal finds its handler.
    with process.active().nothing_to_lose():
        import jax

        from kd.parallel import distributed
        from kd.training import loop, reuse

    enable_compilation_cache()

    # The processes join before the config is read, which may ask JAX for the devices.
    with distributed.session(known.distributed):
        config = read(known, assignments)
        choice = reuse.Choice(only=known.stages, again=known.again, longer=known.longer)
        report = loop.run(config, known.workdir, choice)
    if jax.process_index() == 0:
        print(f'Done. Report: {report}' if report else f'Done: {known.workdir}')
    return 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags, and the fields of the config that the command line sets."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.main', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('--config', required=True, metavar='FILE[:ARGUMENT]')
    parser.add_argument('--workdir', required=True, metavar='DIRECTORY')
    parser.add_argument('--data_dir', default='', metavar='DIRECTORY', help='sets config.data_dir')
    parser.add_argument(
        '--distributed', default='', metavar='auto|HOST:PORT,COUNT,INDEX',
        help='joins the processes of several hosts; also by the variable KD_DISTRIBUTED',
    )  # fmt: skip
    names: Any = dict(type=_names, default=(), metavar='STAGE[,STAGE...]')
    parser.add_argument('--stages', **names, help='runs these alone; others must be done')
    parser.add_argument('--again', **names, help='begins these anew; their files go to old/')
    parser.add_argument('--longer', **names, help='lets these, done, go on to more steps')
    known, rest = parser.parse_known_args(argv)
    for flag in ('workdir', 'data_dir'):
        files.local(getattr(known, flag), f'--{flag}')
    return known, overrides(rest)


def read(known: argparse.Namespace, assignments: Mapping[str, str]) -> ConfigDict:
    """The config with its overrides."""
    from kd import config as config_lib
    from kd.overrides import override

    config = config_lib.load(known.config)
    for told in override(config, assignments):
        print(f'kd: {told}', file=sys.stderr)
    if known.data_dir:
        config.data_dir = known.data_dir
    return config


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(',')))


def overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`['--config.a.b=1']` as `{'a.b': '1'}`."""
    assignments = {}
    for argument in arguments:
        flag, equals, value = argument.partition('=')
        if not argument.startswith(_PREFIX) or not equals:
            near = did_you_mean(flag, _FLAGS)
            raise UserError(
                f"Unknown argument '{argument}'.{near} Fields of the config are set by "
                '--config.FIELD=VALUE.'
            )
        assignments[flag.removeprefix(_PREFIX)] = value
    return assignments


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where already."""
    import jax

    if getattr(jax.config, 'jax_compilation_cache_dir', None) is not None:
        return
    try:
        cache = Path.home() / '.cache' / 'kd' / 'jax'
    except RuntimeError:
        return  # A user without a home, in a container as a rule.
    jax.config.update('jax_compilation_cache_dir', str(cache))


if __name__ == '__main__':
    process.command(_main)
