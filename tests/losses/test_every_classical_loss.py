"""The classical losses keep what all losses promise."""

from classical_oracles import CLASSICAL, OF_LOGITS
from promises import *  # noqa: F403

LOSSES = CLASSICAL
ON_FEATURES = [name for name in CLASSICAL if name not in OF_LOGITS]
WEIGHT_HELD = ('weighted_soft_label',)  # see test_classical_losses
