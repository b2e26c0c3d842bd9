"""Verifiers of tests, for the processes that run them."""

import os
import time

import numpy as np


def total(tokens, *, target):
    """1 where the tokens sum to the target; some tokens make it misbehave."""
    if 91 in tokens:
        raise RuntimeError('91 is no token')
    if 92 in tokens:
        time.sleep(3600)
    if 93 in tokens:
        os._exit(1)
    if 94 in tokens:
        return np.nan
    print('what a verifier prints goes nowhere')
    return float(np.sum(tokens) == target)


def process(tokens):
    """The number of the process."""
    return float(os.getpid())


def same_text(answer, solution):
    """1 where an answer is the solution, word by word."""
    return float(answer.split() == solution.split())
