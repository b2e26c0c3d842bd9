"""What kd costs beside named peers, which do the same work on the same cores in turns.

    python -m kd.benchmarks --page
    python -m kd.benchmarks loop quickstart --page --peers=peers/bin/python

Without names all comparisons are made. With `--page` their tables replace those of
docs/performance.md and of the JSON beside it; others stay, with their own dates. A comparison is a
module with a function `rows(options)`, of options `peers`, `rounds`, `core` and `weights`, that
returns `kd.benchmarks.turns.Row`s, none where the peer is not there.
"""
