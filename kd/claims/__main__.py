"""Claims: a paper's headline as an experiment of arms and seeds, with a verdict.

    python -m kd.claims logit_kd             run one, write results/logit_kd.json and .png
    python -m kd.claims logit_kd --smoke     a tiny version that only shows that it runs
    python -m kd.claims mtt --data_dir=DIR   with tfds data that lies in DIR
    python -m kd.claims --list               all claims with the verdicts measured so far
    python -m kd.claims --readme             rewrite the table of claims in README.md

See `kd.claims.claim` for what a claim is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.claims.claim import RESULTS, names, results, run, text, write_readme
from kd.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit status 0 whatever the verdict, 2 for an unknown claim or absent data."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.claims',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('names', nargs='*', metavar='NAME')
    parser.add_argument('--smoke', action='store_true', help='a tiny version')
    parser.add_argument(
        '--data_dir', metavar='DIRECTORY',
        help='where tfds data lies; default: TFDS_DATA_DIR, then ~/tensorflow_datasets',
    )  # fmt: skip
    parser.add_argument('--output', type=Path, help='where results go; default: results/')
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--readme', action='store_true')
    arguments = parser.parse_args(argv)
    if arguments.data_dir:
        # What `kd.data.sources.load` goes by where no directory is named.
        os.environ['TFDS_DATA_DIR'] = arguments.data_dir
    try:
        if arguments.list:
            known = {result['claim']: result['verdict'] for result in results()}
            for name in names():
                print(f'{name:32s} {known.get(name, "not measured")}')
        for name in arguments.names:
            default = Path('runs/claims') if arguments.smoke else RESULTS
            print(text(run(name, smoke=arguments.smoke, output=arguments.output or default)))
        if arguments.readme:
            write_readme()
    except UserError as error:
        print(f'kd: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
