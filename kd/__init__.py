"""kd: a reference codebase for distillation in JAX."""

import contextlib
import os
import signal
import sys
from importlib import metadata

__version__ = '0.1.0'


def load(directory, weights='final'):
    """The network of a finished stage with its weights: `kd.loading.load`."""
    from kd import loading

    return loading.load(directory, weights)


# On CPUs XLA of this jaxlib fuses products into sums, and is wrong where an operand is filled with
# one number: sum (y - x @ jnp.full((2, 2), 0.1)) ** 2 of 4,096 rows. It is told not to, which costs
# no time that could be measured. XLA reads this when a process first computes.
# Without jaxlib, as where peers of benchmarks are, there is nothing to tell.
with contextlib.suppress(metadata.PackageNotFoundError):
    if metadata.version('jaxlib') == '0.10.2':
        os.environ['XLA_FLAGS'] = (
            f'--xla_cpu_experimental_ynn_fusion_type= {os.environ.get("XLA_FLAGS", "")}'
        )

# So it is while Python looks for the module that `python -m kd...` names. Until that module takes
# the signals, Ctrl-C ends the process at once: raised in imports, it is lost or ends in a crash.
if sys.argv[:1] == ['-m'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
