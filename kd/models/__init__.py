"""Flax linen networks, one family per file.

Every classifier is called as `network(x, train=False) -> logits` and has the attributes
`num_classes` and `dtype`: parameters are float32, layers compute in `dtype` ('bfloat16' halves
memory traffic on accelerators), and the features, the head and the logits end in float32. The
modules whose outputs methods use as features are named for it (`block0`, `stage1`, `features`), so
that `capture_intermediates` finds them.
"""
