"""Distillation of diffusion models into generators of few steps.

`distribution_matching` holds the loop once; a paper is a small file that gives it parts.
"""
