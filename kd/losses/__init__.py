"""Losses: pure functions of arrays, student first, one value per example, no reduction.

    from kd.losses import divergence

    loss = 4.0**2 * divergence.forward_kl(student_logits, teacher_logits, temperature=4.0).mean()

Import the module, not its functions: `divergence.forward_kl` says what `forward_kl` alone does not.
They know no network, config or state, and take a mask as `where=`.

What a teacher says, and how far the student is from it:

| module | holds |
|---|---|
| `signal` | the forms of a teacher: dense, top-k with tail, sampled, hidden states and head |
| `divergence` | KL in all mixtures, Jensen-Shannon, total variation, alpha-beta, Renyi |
| `sequence` | these and any loss of tokens from hidden states, without the logits of all tokens |
| `aggregate` | weights of tokens: the denominators of means over tokens and sequences |
| `token` | of language models: TAID's targets, entropies, gates, masks, rankings, temperatures |
| `calibration` | the calibration error, and teachers recalibrated to it |
| `classification` | cross-entropy, its mixture with a teacher, decoupled KD, WSLD, logits |
| `relation` | DIST, MLKD, RKD, PKT, CCKD, ICKD: across classes, examples and channels |
| `feature` | FitNets, attention transfer, similarity-preserving, CKA; capture from Flax |
| `feature_maps` | FSP, NST, AB, OFD, factor transfer, ReviewKD, VID, CWD |
| `singular` | KDSVD, of the singular vectors of maps |
| `pixel` | pixels of hidden patches |
| `train_free` | scores of untrained students |
| `contrastive` | InfoNCE within a batch, CRD with its bank |
| `robust` | projected gradients; TRADES, RSLAD, ARD, AdaAD |
| `influence` | of an example on a validation loss, and weights of it |
| `preference`, `preference_family` | over candidates: DPO and relatives, SimPO, REDI, KTO |
| `policy` | of rewards: advantages, clipped surrogates, KL estimates |

Flows: `interpolant` (paths from noise to data), `flow_map` (the residuals), `flow_map_family` and
`flow_map_algorithms` (the published losses made of them), `flow_map_checks`.

Diffusion: `schedule` (noise, and what networks predict), `score_distillation` (directions of a
generator, denoising), `adversarial`.

Dataset distillation: `gradient_matching`, `trajectory` and `segments`, `mean_embedding`,
`batch_statistics`, `sharpness`, `transport`.

Latents: `independence` of a group, and energies.

`numerics` has the softmax arithmetic that the others share, `outcomes` what divergences are made
of, `fused` the sweep behind `sequence`.

A few are statistics of the batch they are given, and of its parts another number: `OF_BATCH`.
"""

from collections.abc import Callable
from typing import Any

from kd.losses.contrastive import info_nce
from kd.losses.feature import linear_cka, similarity_preserving
from kd.losses.mean_embedding import mean_embedding_distance, mmd2
from kd.losses.relation import (
    batch_correlation,
    class_correlation,
    correlation_congruence,
    intra_class_correlation,
    probabilistic_transfer,
    rkd_angle,
    rkd_distance,
)

OF_BATCH: frozenset[Callable[..., Any]] = frozenset(
    {
        batch_correlation,
        class_correlation,
        correlation_congruence,
        info_nce,
        intra_class_correlation,
        linear_cka,
        mean_embedding_distance,
        mmd2,
        probabilistic_transfer,
        rkd_angle,
        rkd_distance,
        similarity_preserving,
    }
)


def check_micro_batches(loss: Callable[..., Any], micro_batches: int) -> None:
    """Raises ValueError where a loss of `OF_BATCH` would see parts of the batch alone."""
    if micro_batches > 1 and loss in OF_BATCH:
        name = getattr(loss, '__name__', loss)
        raise ValueError(
            f'{name} compares the examples of a batch with each other, which micro_batches='
            f'{micro_batches} would tear apart; set micro_batches=1.'
        )
