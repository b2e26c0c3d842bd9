"""The other side of benchmarks, run by a Python of its own, where what it imports is installed.

    python -m venv peers
    peers/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    peers/bin/pip install -e '.[peers]'
    export KD_PEERS=$PWD/peers/bin/python

(The second line spares a machine without a GPU gigabytes.) Of kd, `kd.benchmarks.turns` and
`kd.errors` alone are imported here, which need Python alone. With the extra `test` beside, the same
Python runs the tests that compare with transformers.
"""
