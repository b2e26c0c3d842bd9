"""kd: a reference codebase for distillation in JAX."""

import signal
import sys

__version__ = '0.1.0'

# So it is while Python looks for the module that `python -m kd...` names. Until that module takes
# the signals, Ctrl-C ends the process at once: raised in imports, it is lost or ends in a crash.
if sys.argv[:1] == ['-m'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
