"""PACED: distillation weighted by the student's pass rate (2026, arXiv:2603.11178).

Stages: the student is pre-trained on answers, then distilled by forward KL, then, from those
weights, by reverse KL; pass rates are estimated anew at every step from eight rollouts.

    python -m kd.main --config=configs/lm/paced.py:cpu --workdir=runs/paced
    python -m kd.main --config=configs/lm/paced.py:learnable --workdir=runs/paced_learnable

| variant | problems | hardware |
|---|---|---|
| cpu (default) | six families; in the hardest, 40 %, the teacher is incoherent | 2 cores, 1 min |
| learnable | the teacher knows the hardest too: uniform weights should win | 2 cores, 1 min |

To compare, set `--config.forward.method.weighting=uniform` (or hard), likewise `reverse`.

The paper distils Qwen3-8B (GRPO) into Qwen3-1.7B on DAPO-Math-17k, K = 8 rollouts at T = 1, prompts
of 2,048 and responses of 8,192 tokens, batches of 256 at a learning rate of 1e-6: MATH-500 76.8
uniform, 79.4 PACED. A language model brings its pass rates, estimated before each stage, as
`pass_rate` in the batch, and its masks as `response_mask`.
"""

from kd import config as kd_config
from kd.data.builders import verifiable

VARIANTS = ('cpu', 'learnable')


def get_config(variant: str = 'cpu'):
    """The recipe of a variant."""
    return kd_config.variant(variant, {'cpu': cpu, 'learnable': learnable})()


def cpu(coherent: bool = False):
    """The toy; `coherent` lets the teacher know the hardest family."""

    def data(mix):
        source = dict(
            name='kd.data.builders.verifiable.problems', mix=tuple(mix), coherent=coherent
        )
        return dict(source=source, train='train', validation='validation', test='test')

    def run(steps, lr):
        return dict(
            network=dict(name='kd.models.structured.AnswerMLP', widths=(96, 96)),
            optimizer=dict(name='adam', lr=lr),
            steps=steps,
            batch_size=64,
            log_every=50,
            eval_every=100,
            checkpoint_every=300,
            evaluators={
                'validation': dict(name='kd.evaluators.answers.answers', groups=verifiable.FAMILIES)
            },
        )

    def distil(divergence):
        return dict(
            name='kd.methods.lm.paced.paced',
            divergence=f'kd.losses.divergence.{divergence}',
            weighting='beta',
            rollouts=8,
        )

    config = kd_config.recipe(
        stages=('pretraining', 'forward', 'reverse'), data=data(verifiable.DISTILLATION_MIX)
    )
    config.pretraining = kd_config.stage(
        method=dict(name='kd.methods.vision.supervised.supervised'),
        data=data(verifiable.PRETRAINING_MIX),
        **run(900, 2e-3),
    )
    config.forward = kd_config.stage(
        method=distil('forward_kl'), references=dict(start='pretraining'), **run(200, 1e-3)
    )
    config.reverse = kd_config.stage(
        method=distil('reverse_kl'), references=dict(start='forward'), **run(100, 1e-3)
    )
    return config


def learnable():
    """The counter-regime: what the student always fails can be learnt."""
    return cpu(coherent=True)
