"""Claims: a paper's headline as an experiment of arms and seeds, with a verdict.

    python -m kd.claims                      all claims with the verdicts measured so far
    python -m kd.claims logit_kd             run one, write results/logit_kd.json and .png
    python -m kd.claims logit_kd --smoke     a tiny version that only shows that it runs
    python -m kd.claims mtt --data_dir=DIR   with tfds data that lies in DIR

See `kd.claims.claim` for what a claim is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from kd.claims import results
from kd.claims.claim import names, redraw, run, text
from kd.process import command, path_argument


def main(argv: Sequence[str] | None = None) -> int:
    """0 whatever the verdict; raises `UserError` for an unknown claim or absent data."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.claims',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('names', nargs='*', metavar='NAME')
    parser.add_argument('--smoke', action='store_true', help='a tiny version')
    parser.add_argument(
        '--data_dir', type=path_argument, metavar='DIRECTORY',
        help='where tfds data lies; default: TFDS_DATA_DIR, then ~/tensorflow_datasets',
    )  # fmt: skip
    parser.add_argument('--output', type=path_argument, help='where results go; default: results/')
    parser.add_argument(
        '--draw', action='store_true', help='only draw the figure anew from what was measured'
    )
    parser.add_argument('--list', action='store_true', help='all claims, as without a name')
    arguments = parser.parse_args(argv)
    if arguments.data_dir:
        # What `kd.data.sources.load` goes by where no directory is named.
        os.environ['TFDS_DATA_DIR'] = str(arguments.data_dir)
    if arguments.list or not arguments.names:
        measured = results.measured()
        for name in names():
            print(f'{name:32s} {results.verdict(name, measured)}')
    for name in arguments.names:
        default = Path('runs/claims') if arguments.smoke else results.RESULTS
        output = arguments.output or default
        if arguments.draw:
            redraw(name, output=output)
        else:
            print(text(run(name, smoke=arguments.smoke, output=output)))
    return 0


if __name__ == '__main__':
    command(main)
