"""kd: a reference codebase for distillation in JAX."""

__version__ = '0.1.0'
