"""Runs a recipe: `python -m kd.main --config=configs/vision/logit_kd.py:cpu --workdir=runs/mine`.

Every field of the config can be changed on the command line: `--config.student.steps=500`.
Running the same command again resumes, or says that all is done.

Exit status: 0 done; 2 something to correct (config, data, work directory); 3 a loss became
non-finite; 75 stopped by SIGTERM with a checkpoint written, run again to go on; 76 another process
of the run has died.

On several hosts the same command runs on each with `--distributed=auto` (Slurm, TPU pods, Open MPI)
or `--distributed=HOST:PORT,COUNT,INDEX`; see launch/.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from kd import config as config_lib
from kd.errors import NonFiniteError, Preempted, UserError, did_you_mean
from kd.overrides import override

EXIT_USER, EXIT_NONFINITE, EXIT_PREEMPTED = 2, 3, 75
_PREFIX = '--config.'


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. Errors meant for people become one line."""
    logging.basicConfig(format='%(message)s', level=logging.WARNING)
    # TensorFlow writes TensorBoard events and tfds copies, and would have much to say of itself.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    try:
        config, workdir, processes = parse(sys.argv[1:] if argv is None else argv)
        enable_compilation_cache()
        # Importing the loop takes a second; a mistyped flag is told before.
        from kd.parallel import distributed
        from kd.training import loop

        with distributed.session(processes):
            report = loop.run(config, workdir)
    except UserError as error:
        return _told(error, EXIT_USER)
    except NonFiniteError as error:
        return _told(error, EXIT_NONFINITE)
    except Preempted as error:
        return _told(error, EXIT_PREEMPTED)
    if jax.process_index() == 0:
        print(f'Done. Report: {report}' if report else f'Done: {workdir}')
    return 0


def parse(argv: Sequence[str]) -> tuple[config_lib.ConfigDict, str, str]:
    """The config with its overrides, the work directory, and how processes are joined."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.main', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('--config', required=True, metavar='FILE[:ARGUMENT]')
    parser.add_argument('--workdir', required=True, metavar='DIRECTORY')
    parser.add_argument('--data_dir', metavar='DIRECTORY', help='sets config.data_dir')
    parser.add_argument(
        '--distributed', default='', metavar='auto|HOST:PORT,COUNT,INDEX',
        help='joins the processes of several hosts; also by the variable KD_DISTRIBUTED',
    )  # fmt: skip
    known, rest = parser.parse_known_args(argv)
    config = config_lib.load(known.config)
    for told in override(config, overrides(rest)):
        print(f'kd: {told}', file=sys.stderr)
    if known.data_dir is not None:
        config.data_dir = known.data_dir
    return config, known.workdir, known.distributed


def overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`['--config.a.b=1']` as `{'a.b': '1'}`."""
    assignments = {}
    for argument in arguments:
        flag, equals, value = argument.partition('=')
        if not argument.startswith(_PREFIX) or not equals:
            near = did_you_mean(flag, ['--config', '--workdir', '--data_dir', '--distributed'])
            raise UserError(
                f"Unknown argument '{argument}'.{near} Fields of the config are set by "
                '--config.FIELD=VALUE.'
            )
        assignments[flag.removeprefix(_PREFIX)] = value
    return assignments


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where already."""
    if getattr(jax.config, 'jax_compilation_cache_dir', None) is None:
        cache = Path.home() / '.cache' / 'kd' / 'jax'
        jax.config.update('jax_compilation_cache_dir', str(cache))


def _told(error: Exception, status: int) -> int:
    print(f'kd: {error}', file=sys.stderr)
    return status


if __name__ == '__main__':
    sys.exit(main())
