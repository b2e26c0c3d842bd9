"""Fair records: the parts of both losses, what is generated, and how it is judged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from scipy.spatial.distance import cdist

from kd import config as kd_config
from kd.claims import seeds
from kd.config import Recipe
from kd.data import catalogue, tabular
from kd.data.builders import record_files
from kd.data.context import SourceContext
from kd.data.sources import DataError
from kd.errors import UserError
from kd.evaluators import records as evaluator
from kd.evaluators.fairness import demographic_parity_ratio, equalized_odds_ratio
from kd.losses import independence, mean_embedding
from kd.methods.tabular.fair_data import distil_latents, fair_vae, log_mean, reconstruction
from kd.models.mlp import MLP
from kd.models.tabular import LatentStudent, TabularVAE, by_column
from kd.network import from_linen
from kd.sampling.tabular import sample_columns

pytestmark = pytest.mark.usefixtures('compiled_quickly')

COLUMNS, B = (3, 2), 24
INPUTS = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
SPEC = {'input': INPUTS[0], 'group': INPUTS[1], 'label': INPUTS[1]}


def vae(**options):
    return from_linen(TabularVAE(columns=COLUMNS, width=8, latent=2, **options), *INPUTS)


def small(mode):
    module = LatentStudent(mode=mode, columns=COLUMNS, width=4, latent=2)
    shapes = {'input': jax.ShapeDtypeStruct((2,), jnp.int32), 'group': INPUTS[1]}
    shapes['group'] = jax.ShapeDtypeStruct((), jnp.int32)
    return from_linen(module, *module.example_inputs(shapes))


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'input': np.stack([rng.integers(n, size=B) for n in COLUMNS], 1).astype(np.int32),
        'group': rng.integers(2, size=B).astype(np.int32),
        'label': rng.integers(2, size=B).astype(np.int32),
    }


def context_of(network, vae=None):
    references = {} if vae is None else {'vae': vae}
    return seeds.context(network=network, references=references, tx=optax.sgd(1.0), spec=SPEC)


def cross_entropy(logits, labels):
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
    return -log_p[np.arange(len(labels)), labels]


def test_the_loss_of_the_autoencoder_is_the_sum_of_its_parts():
    network, batch = vae(), batch_of()
    methods = {beta: fair_vae(context_of(network), beta=beta) for beta in (0.0, 100.0)}
    state = jax.jit(methods[0.0].init)(jax.random.key(0))
    metrics = {beta: jax.jit(m.step)(state, batch)[1] for beta, m in methods.items()}
    value = {beta: {k: float(x.total / x.count) for k, x in found.items()}
             for beta, found in metrics.items()}  # fmt: skip
    variables, key = state.variables(), state.step_key()
    mu, variance = network.apply(variables, *network.of(batch), method='encode').logits
    kl = independence.gaussian_kl(mu, variance)
    plain = value[0.0]
    assert plain['kl'] == pytest.approx(float(kl.mean()), rel=1e-5)
    # What beta = 0 leaves is a conditional autoencoder: no word of the dependence.
    parts = plain['reconstruction'] + plain['outcome'] + plain['kl']
    assert plain['loss'] == pytest.approx(parts, rel=1e-6)
    dependence = independence.distance_covariance(mu, variance, batch['group'], 2)
    assert plain['dependence'] == pytest.approx(float(dependence), rel=1e-4)
    assert float(dependence) > 1e-6
    assert value[100.0]['loss'] == pytest.approx(parts + 100 * float(dependence), rel=1e-5)
    # The outcome sees no group, and the columns do; in the control both do.
    for other, blind in ((network, True), (vae(outcome_from='latent_and_group'), False)):
        params = jax.jit(other.init)(jax.random.key(1))
        told = [
            [other.apply(params, mu, jnp.full(B, g), method=m).logits for g in (0, 1)]
            for m in ('outcome', 'decode')
        ]
        assert np.allclose(*told[0]) == blind
        assert not np.allclose(*told[1])
    del key


def test_reconstruction_adds_up_columns():
    rng = np.random.default_rng(1)
    logits, x = rng.normal(size=(B, 5)), batch_of()['input']
    wanted = cross_entropy(logits[:, :3], x[:, 0]) + cross_entropy(logits[:, 3:], x[:, 1])
    np.testing.assert_allclose(reconstruction(jnp.asarray(logits), x, COLUMNS), wanted, rtol=1e-5)
    assert [part.shape[-1] for part in by_column(jnp.asarray(logits), COLUMNS)] == [3, 2]


@pytest.mark.parametrize('mode', ['noise', 'data'])
def test_the_student_learns_from_latents_and_what_is_said_of_them(mode):
    network, teacher, batch = small(mode), vae(), batch_of()
    frozen = {'vae': jax.jit(teacher.init)(jax.random.key(3))}
    method = distil_latents(context_of(network, teacher))
    state = jax.jit(method.init)(jax.random.key(0), frozen)

    def total(params):
        found = method.step(state.replace(params={'network': params}), batch)[1]['loss']
        return found.total / found.count

    value, own = jax.jit(jax.value_and_grad(total))(state.params['network'])
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(own)) > 1e-4
    if mode == 'noise':
        assert float(value) > 0
        return
    # By hand, in the mode with pairs.
    mu, _ = teacher.apply(frozen['vae'], *teacher.of(batch), method='encode').logits
    z = network.apply(state.variables(), batch['input'], batch['group']).logits
    wanted = np.sum((np.asarray(z) - np.asarray(mu)) ** 2, -1)
    for how in ('decode', 'outcome'):
        logits = [
            teacher.apply(frozen['vae'], at, batch['group'], method=how).logits for at in (mu, z)
        ]
        cuts = [by_column(x, COLUMNS) if how == 'decode' else [x] for x in logits]
        for theirs, ours in zip(*cuts, strict=True):
            p, q = (scipy.special.log_softmax(np.asarray(x), -1) for x in (theirs, ours))
            wanted = wanted + np.sum(np.exp(p) * (p - q), -1)
    assert float(value) == pytest.approx(wanted.mean(), rel=1e-5)


def test_a_student_of_noise_by_hand_and_what_is_equal_costs_nothing():
    network, teacher, batch = small('noise'), vae(), batch_of()
    variables = jax.jit(teacher.init)(jax.random.key(3))
    frozen, value = {'vae': variables}, {}
    for distance, beta in (('energy', 0.0), ('mmd', 0.0), ('energy', 50.0)):
        method = distil_latents(
            context_of(network, teacher), utility=0.5, distance=distance, beta=beta
        )
        state = jax.jit(method.init)(jax.random.key(0), frozen)
        _, metrics = jax.jit(method.step)(state, batch)
        value[distance, beta] = {k: float(x.total / x.count) for k, x in metrics.items()}
    noise_key, sample_key = jax.random.split(state.step_key())
    mu, variance = teacher.apply(variables, *teacher.of(batch), method='encode').logits
    z = mu + np.sqrt(variance) * jax.random.normal(sample_key, mu.shape)
    own = network.apply(state.variables(), jax.random.normal(noise_key, mu.shape)).logits
    useful = 0.0
    for how in ('decode', 'outcome'):
        logits = [teacher.apply(variables, x, batch['group'], method=how).logits for x in (z, own)]
        cuts = [by_column(x, COLUMNS) if how == 'decode' else [x] for x in logits]
        for theirs, ours in zip(*cuts, strict=True):
            p, q = (scipy.special.softmax(np.asarray(x), -1).mean(0) for x in (theirs, ours))
            useful += np.sum(p * np.log(p / q))
    far = {
        'energy': 2 * cdist(own, z).mean() - cdist(own, own).mean() - cdist(z, z).mean(),
        'mmd': float(mean_embedding.mmd2(own, z, kernel='gaussian')),
    }
    dependence = independence.distance_covariance(own, jnp.ones_like(own), batch['group'], 2)
    for (distance, beta), found in value.items():
        assert found['quality'] == pytest.approx(far[distance], rel=1e-4)
        assert found['utility'] == pytest.approx(useful, rel=1e-3, abs=1e-6)
        wanted = far[distance] + 0.5 * useful + beta * float(dependence)
        assert found['loss'] == pytest.approx(wanted, rel=1e-4)
    assert 50 * float(dependence) > 1e-4
    # Latents that are the teacher's.
    assert abs(float(independence.energy_distance(z, z))) < 1e-6
    # A category that no record may have is a large number and not infinite.
    sure = jnp.array([[0.0, 300.0], [0.0, 300.0]])
    np.testing.assert_allclose(log_mean(sure) - log_mean(sure)[1], [-300.0, 0.0])
    assert np.isfinite(jax.grad(lambda x: log_mean(x)[0])(sure)).all()


def test_columns_are_drawn_from_their_softmax():
    logits = jnp.asarray([0.0, 1.0, -1.0, 0.5, 0.0])
    n = 20_000
    drawn = jax.jit(lambda k: sample_columns(k, jnp.tile(logits, (n, 1)), COLUMNS))(
        jax.random.key(0)
    )
    for column, (a, b) in enumerate(((0, 3), (3, 5))):
        wanted = scipy.special.softmax(np.asarray(logits[a:b]))
        found = np.bincount(np.asarray(drawn[:, column]), minlength=b - a) / n
        assert np.abs(found - wanted).max() < 3 * np.sqrt(0.25 / n)


def test_ratios_of_rates_and_nothing_over_nothing():
    group = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    assert demographic_parity_ratio(np.ones(8), group) == 1.0
    assert demographic_parity_ratio(np.zeros(8), group) == 1.0  # 0 / 0
    assert demographic_parity_ratio(group == 1, group) == 0.0
    positive = np.array([1, 1, 0, 1, 0, 0, 0, 1])
    assert demographic_parity_ratio(positive, group) == pytest.approx(0.25)
    label = np.array([1, 1, 0, 1, 1, 0, 0, 1])
    # True positives: 1, 1/2, 1; false positives: 0 of 1, 0 of 2, and none to ask in group 2.
    assert equalized_odds_ratio(positive, label, group) == pytest.approx(0.5)
    assert equalized_odds_ratio(np.zeros(8), label, group) == 1.0
    assert equalized_odds_ratio(label, label, group) == 1.0
    assert equalized_odds_ratio([1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]) == 0.0


def test_real_records_are_unfair_and_their_merit_is_known():
    rng = np.random.default_rng(0)
    train, test = (record_files.biased(rng, n) for n in (4_000, 4_000))
    found = evaluator.classified(train, test, record_files.COLUMNS)
    assert 0.83 < found['accuracy'] < 0.9
    assert found['dp_ratio'] < 0.3
    assert 0.6 < found['merit_accuracy'] < 0.78
    # Learned from the merit instead, the same classifier is nearly fair.
    fair = evaluator.classified(
        {**train, 'label': train['merit']}, test, record_files.COLUMNS, boosted=True
    )
    assert fair['dp_ratio'] > 0.9
    assert fair['merit_accuracy'] > 0.85
    constant = evaluator.classified({**train, 'label': np.ones(4_000, int)}, test, (5,) * 6)
    assert constant['dp_ratio'] == constant['eo_ratio'] == 1.0
    points = np.stack([train['group'], rng.normal(size=4_000)], 1)
    assert evaluator.group_auc(points, train['group'], points, train['group']) == 1.0
    blind = evaluator.group_auc(points[:, 1:], train['group'], points[:, 1:], train['group'])
    assert blind == pytest.approx(0.5, abs=0.03)
    three = rng.integers(3, size=4_000)
    told = evaluator.group_auc(three[:, None] * 1.0, three, three[:, None] * 1.0, three)
    assert told > 0.8


def test_the_evaluator_asks_real_records_of_both_kinds_of_network():
    source = tabular.records(SourceContext('validation'), of='biased')
    batch = source.fetch(np.arange(200))
    form = tabular.form('biased')
    shapes = [jax.ShapeDtypeStruct((1, *batch[k].shape[1:]), jnp.int32) for k in ('input', 'group')]
    teacher = from_linen(TabularVAE(columns=form.columns, width=8, latent=2), *shapes)
    student = from_linen(LatentStudent(latent=2, width=4), jax.ShapeDtypeStruct((1, 2), 'float32'))
    frozen = {'vae': jax.jit(teacher.init)(jax.random.key(3))}
    given = {name: jnp.asarray(x) for name, x in batch.items()}
    given['mask'] = jnp.arange(200) < 150
    for network, other in ((teacher, None), (student, teacher)):
        context = seeds.context(
            network=network, references={'vae': other} if other else {}, tx=optax.sgd(1.0),
            spec=source.spec, source=lambda split: source,
        )  # fmt: skip
        method = distil_latents(context) if other else fair_vae(context)
        state = jax.jit(method.init)(jax.random.key(0), frozen)
        found = evaluator.records(context, count=300, real='any', boosted=False).run(state, [given])
        real = source.fetch(np.arange(len(source)))
        asked = {name: x[:150] for name, x in batch.items()}
        for name, value in evaluator.classified(real, asked, form.columns).items():
            assert found[f'real_{name}'] == pytest.approx(value)
        assert ('group_auc' in found) == (other is None)
        assert 0 <= found['dp_ratio'] <= 1
        assert 0 <= found['coverage'] <= 1


def context(split, folder):
    return SourceContext(split, Recipe(stages={}, data={}, data_dir=str(folder)))


def test_compas_is_filtered_as_propublica_does(tmp_path):
    names = [
        *tabular._COMPAS,
        'two_year_recid',
        'days_b_screening_arrest',
        'is_recid',
        'score_text',
    ]
    good = dict(sex='Male', age_cat='25 - 45', race='Other', c_charge_degree='F', juv_fel_count='0',
                juv_misd_count='2', juv_other_count='0', priors_count='7', two_year_recid='1',
                days_b_screening_arrest='-30', is_recid='1', score_text='Low')  # fmt: skip
    rows = [good] * 10 + [
        good | bad
        for bad in (
            dict(days_b_screening_arrest='31'), dict(days_b_screening_arrest=''),
            dict(is_recid='-1'), dict(c_charge_degree='O'), dict(score_text='N/A'),
        )
    ]  # fmt: skip
    folder = tmp_path / 'compas'
    folder.mkdir()
    lines = [','.join(names), *(','.join(row[n] for n in names) for row in rows)]
    (folder / 'compas-scores-two-years.csv').write_text('\n'.join(lines))
    table = record_files.compas(folder)
    assert [len(table.rows[split]) for split in ('train', 'test')] == [8, 2]
    splits, columns, groups = record_files.coded(table, 'race')
    assert (columns, groups) == ((1, 1, 1, 2, 2, 2, 8), 1)
    assert splits['train']['input'][0].tolist() == [0, 0, 0, 0, 1, 0, 7]
    assert splits['test']['label'].tolist() == [1, 1]
    with pytest.raises(DataError, match='these are other files'):
        tabular.records(context('train', tmp_path), of='compas')


def test_adult_is_read_as_published_and_what_is_not_there_is_said(tmp_path):
    folder = tmp_path / 'adult'
    folder.mkdir()
    row = (
        '39, State-gov, 77516, Bachelors, 13, Never-married, ?, Husband, {}, {}, {}, 0, {}, Cuba, '
    )
    train = [row.format('White', 'Male', 2174, 40) + '<=50K',
             row.format('Black', 'Female', 0, 80) + '>50K']  # fmt: skip
    (folder / 'adult.data').write_text('\n'.join(train) + '\n\n')
    (folder / 'adult.test').write_text('|1x3 Cross validator\n' + train[1] + '.\n')
    splits, columns, groups = record_files.coded(record_files.adult(folder), 'sex')
    assert groups == 2
    assert (len(columns), columns[0], columns[-2:]) == (12, 8, (8, 1))
    assert splits['train']['label'].tolist() == [0, 1]
    assert splits['train']['group'].tolist() == [1, 0]
    assert splits['test']['label'].tolist() == [1]
    assert splits['train']['input'][:, [8, 10]].tolist() == [[1, 0], [0, 7]]
    (folder / 'adult.test').write_text(train[0].replace('Cuba', 'Peru') + '.\n')
    with pytest.raises(DataError, match="column 'native-country' has 'Peru', which no training"):
        record_files.coded(record_files.adult(folder), 'sex')
    (folder / 'adult.test').write_text(train[1].replace('Black', 'White') + '.\n')
    (folder / 'adult.data').write_text('\n'.join(train).replace('77516', 'many'))
    with pytest.raises(DataError, match="column 'fnlwgt' has what is no number"):
        record_files.coded(record_files.adult(folder), 'sex')
    (folder / 'adult.data').write_text('\n')
    with pytest.raises(DataError, match="the split 'train' has no records"):
        record_files.coded(record_files.adult(folder), 'sex')
    with pytest.raises(DataError, match=r'there is no file .*compas-scores-two-years\.csv'):
        tabular.records(context('train', tmp_path), of='compas')
    with pytest.raises(DataError, match=r"there is no table 'adlut'\. Did you mean 'adult'"):
        tabular.records(context('train', tmp_path), of='adlut')
    with pytest.raises(DataError, match="'adult' has no column 'height'"):
        tabular.form('adult', 'height')
    described = tabular.records(context('train', catalogue.DESCRIBED), of='adult', sensitive='race')
    assert described.spec['input'].shape == (12,)


def test_what_does_not_fit_is_said():
    network = from_linen(MLP(widths=(4,), num_classes=2), INPUTS[0])
    with pytest.raises(UserError, match=r'stage\.network must be a kd.models.tabular.TabularVAE'):
        fair_vae(context_of(network))
    unlabelled = dataclasses.replace(context_of(vae()), spec={'input': INPUTS[0]})
    with pytest.raises(UserError, match=r"wants records with \['label', 'group'\]"):
        fair_vae(unlabelled)
    with pytest.raises(UserError, match="LatentStudent with the autoencoder's latent=2"):
        distil_latents(context_of(network, vae()))
    with pytest.raises(UserError, match=r'references\.vae names no stage of an autoencoder'):
        distil_latents(context_of(network))
    with pytest.raises(ValueError, match='records have 2 columns, and 1 are declared'):
        jax.eval_shape(from_linen(TabularVAE(columns=(3,)), *INPUTS).init, jax.random.key(0))
    for module, options in ((TabularVAE, {'outcome_from': 'x'}), (LatentStudent, {'mode': 'x'})):
        with pytest.raises(ValueError, match="'x'"):
            module(**options)
    assert kd_config.load('configs/tabular/fair_data.py:adult,race').fair.network.groups == 5
