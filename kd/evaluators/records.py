"""Generated records judged by classifiers that learn from them and are asked of real ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from kd.context import Context, Probe
from kd.data.transforms import standardised
from kd.errors import UserError
from kd.evaluators.fairness import demographic_parity_ratio, equalized_odds_ratio
from kd.evaluators.fidelity import density_coverage
from kd.evaluators.ranking import roc_auc
from kd.methods.tabular.fair_data import VAE
from kd.models.tabular import LatentStudent, TabularVAE
from kd.network import Network
from kd.ranges import Count
from kd.sampling.tabular import sample_records
from kd.state import PyTree

# Points of which density and coverage are measured.
_POINTS = 1_000
Records = Mapping[str, np.ndarray]


def classified(
    train: Records, test: Records, columns: Sequence[int], *, boosted: bool = False
) -> dict[str, float]:
    """A classifier of `label` from `input` alone, trained on some records, asked of others.

    `accuracy`, `dp_ratio` and `eo_ratio` (see `kd.evaluators.fairness`), and `merit_accuracy`
    where the records it is asked of have a `merit`.

    Args:
      train: `input` int [N, C] and `label` int [N] of 0 and 1.
      test: these, `group` and perhaps `merit`.
      columns: categories of each column.
      boosted: trees (gradient boosting) in place of logistic regression.
    """
    if len(np.unique(train['label'])) < 2:
        predicted = np.full(len(test['label']), train['label'][0])
    elif boosted:
        model = HistGradientBoostingClassifier(max_iter=60, random_state=0)
        predicted = model.fit(train['input'], train['label']).predict(test['input'])
    else:
        # A small penalty: columns side by side are not of full rank.
        regression = LogisticRegression(C=10.0, max_iter=300)
        regression.fit(_ones(train['input'], columns), train['label'])
        predicted = regression.predict(_ones(test['input'], columns))
    found = {
        'accuracy': float(np.mean(predicted == test['label'])),
        'dp_ratio': demographic_parity_ratio(predicted, test['group']),
        'eo_ratio': equalized_odds_ratio(predicted, test['label'], test['group']),
    }
    if 'merit' in test:
        found['merit_accuracy'] = float(np.mean(predicted == test['merit']))
    return found


def group_auc(train: np.ndarray, of: np.ndarray, test: np.ndarray, member: np.ndarray) -> float:
    """How well logistic regression tells groups by latents: the area under the ROC curve.

    .5 for not at all, NaN where all are of one group. With more than two groups the mean of one
    against the rest, over groups that occur.

    Args:
      train, test: latents [N, D], [M, D].
      of, member: their groups.
    """
    regression = LogisticRegression(max_iter=300).fit(train, of)
    scores = regression.predict_proba(test)
    if scores.shape[1] == 2:
        return roc_auc(scores[:, 1], member == regression.classes_[1])
    areas = [
        roc_auc(scores[:, i], member == group)
        for i, group in enumerate(regression.classes_)
        if 0 < (member == group).sum() < len(member)
    ]
    return float(np.mean(areas))


def generate(
    key: jax.Array,
    vae: Network,
    variables: PyTree,
    count: int,
    *,
    student: tuple[Network, PyTree] | None = None,
    real: Records | None = None,
) -> dict[str, jax.Array]:
    """Records of latents from the prior, or from a student, and groups drawn apart, evenly.

    Args:
      key: of everything.
      vae, variables: a `TabularVAE`.
      count: records.
      student: a `LatentStudent` and its variables.
      real: records that a student of the mode 'data' encodes, as many of them as `count` asks for,
        again and again.
    """
    latent_key, group_key, record_key = jax.random.split(key, 3)
    z = jax.random.normal(latent_key, (count, vae.module.latent))
    if student is not None:
        network, own = student
        if network.module.mode == 'noise':
            inputs: tuple[jax.Array, ...] = (z,)
        else:
            assert real is not None
            inputs = tuple(jnp.resize(real[name], (count, *real[name].shape[1:]))
                           for name in ('input', 'group'))  # fmt: skip
        z = network.apply(own, *inputs).logits
    group = jax.random.randint(group_key, (count,), 0, vae.module.groups)
    return sample_records(record_key, vae, variables, z, group)


def records(
    context: Context, *, count: Count = 4_000, real: str = 'train', boosted: bool = True
) -> Probe:
    """Records of the stage's autoencoder, or of its student, against the real ones of a split.

    Reports `classified` of logistic regression on `count` generated records, asked of the split
    that the evaluator is given, with `boosted_` before it of gradient boosting, and with `real_`
    before it of logistic regression on real training records; `density` and `coverage` of generated
    records; and of an autoencoder `group_auc`, how well its latents tell the group.

    Args:
      context: the stage.
      count: records to generate.
      real: split of real records to train on, for comparison.
      boosted: ask gradient boosting too.
    """
    network = context.network
    student = isinstance(network.module, LatentStudent)
    vae = context.references.get(VAE) if student else network
    if vae is None or not isinstance(vae.module, TabularVAE):
        raise UserError(
            f'{context.stage}: records are generated by a kd.models.tabular.TabularVAE.'
        )
    columns = vae.module.columns
    make = jax.jit(
        lambda key, variables, own, real: generate(
            key, vae, variables, count, student=(network, own) if student else None, real=real
        )
    )
    encode = jax.jit(lambda v, *x: vae.apply(v, *x, method='encode').logits[0])

    def run(state: Any, batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, float]:
        asked = [
            {k: np.asarray(x)[np.asarray(batch['mask'])] for k, x in batch.items()}
            for batch in batches
        ]
        test = {name: np.concatenate([one[name] for one in asked]) for name in asked[0]}
        known = standardised.everything(context.source(real))
        own = state.variables()
        variables = state.frozen[VAE] if student else own
        inputs = {name: jnp.asarray(known[name]) for name in ('input', 'group')}
        made = jax.device_get(make(jax.random.key(0), variables, own, inputs))
        found = classified(made, test, columns)
        if boosted:
            more = classified(made, test, columns, boosted=True)
            found |= {f'boosted_{name}': value for name, value in more.items()}
        found |= {f'real_{k}': value for k, value in classified(known, test, columns).items()}
        wanted, given = (_ones(one['input'][:_POINTS], columns) for one in (test, made))
        found['density'], found['coverage'] = density_coverage(wanted, given)
        if not student:
            of = [np.asarray(encode(own, one['input'], one['group'])) for one in (known, test)]
            found['group_auc'] = group_auc(of[0], known['group'], of[1], test['group'])
        return found

    return Probe(run)


def _ones(x: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """int [N, C] as float32 [N, sum of columns]."""
    return np.concatenate(
        [np.eye(n, dtype=np.float32)[x[:, i]] for i, n in enumerate(columns)], axis=1
    )
