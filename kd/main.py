"""Runs a recipe: `python -m kd.main --config=configs/vision/logit_kd.py:cpu --workdir=runs/mine`.

Every field of the config can be changed on the command line: `--config.student.steps=500`.
Running the same command again resumes, or says that all is done.

Exit status: 0 done; 2 something to correct (config, data, work directory); 3 a loss became
non-finite; 75 stopped by SIGTERM with a checkpoint written, run again to go on.
"""

from __future__ import annotations

import logging
import os
import sys

from absl import app, flags
from ml_collections import config_flags

from kd.errors import NonFiniteError, Preempted, UserError, did_you_mean

EXIT_USER, EXIT_NONFINITE, EXIT_PREEMPTED = 2, 3, 75

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file with an optional argument: FILE.py:ARGUMENT.', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'tfds data directory; overrides config.data_dir.')


def _main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument '{argv[1]}'; flags start with --.")
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError('Both --config=FILE and --workdir=DIRECTORY are needed.')
    # The cache makes the second start of a recipe quick.
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = os.path.join(os.path.expanduser('~'), '.cache', 'kd', 'jax')
        jax.config.update('jax_compilation_cache_dir', cache)
    from kd import train

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data_dir = _DATA_DIR.value
    report = train.run(config, _WORKDIR.value)
    print(f'Done. Report: {report}' if report else f'Done: {_WORKDIR.value}')
    return 0


def main() -> None:
    """Entry point; turns errors meant for people into one line and an exit status."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    logging.basicConfig(format='%(message)s', level=logging.WARNING)
    try:
        app.run(_main, flags_parser=_parse)
    except UserError as error:
        _fail(str(error), EXIT_USER)
    except NonFiniteError as error:
        _fail(str(error), EXIT_NONFINITE)
    except Preempted as error:
        _fail(str(error), EXIT_PREEMPTED)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"Unknown flag '--{error.flagname}'.{did_you_mean(error.flagname, flags.FLAGS)}"
        ) from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(' '.join(str(error).strip('"').split())) from error
    except FileNotFoundError as error:
        raise UserError(f'There is no config file {error.filename}.') from error


def _fail(text: str, status: int) -> None:
    print(f'kd: {text}', file=sys.stderr)
    sys.exit(status)


if __name__ == '__main__':
    main()
