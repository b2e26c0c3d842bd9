"""The other side of benchmarks, run by a Python of its own, where what it imports is installed.

    python -m venv peers && peers/bin/pip install -e '.[peers]'
    export KD_PEERS=$PWD/peers/bin/python

Nothing else of kd is imported here but `kd.benchmarks.turns`, which needs Python alone.
"""
