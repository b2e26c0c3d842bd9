"""A small policy that answers chains of arithmetic, rewarded and updated twice a step."""

from kd import config as kd_config


def get_config(steps='24'):
    config = kd_config.recipe(
        stages=('student',),
        mesh=dict(data=1),
        data=dict(
            source=dict(name='kd.data.chains.chains', operations={'2': 1.0}, size=64),
            train='train',
            validation='validation',
        ),
    )
    # Many tokens end an answer, so that lengths differ from the first step on.
    sampling = dict(group=4, max_new=5, stop=tuple(range(2, 30)), forbidden=(0, 1))
    config.student = kd_config.stage(
        network=dict(
            name='kd.models.decoders.preset',
            of='toy',
            width=16,
            depth=1,
            heads=2,
            kv_heads=2,
            mlp_hidden=24,
        ),
        method=dict(
            name='kd.methods.rl.grpo.grpo',
            reward=dict(name='kd.rewards.printed.printed'),
            sampling=sampling,
            advantage='dr_grpo',
            # Something to learn before anything is right.
            overlong=4,
            updates=2,
        ),
        optimizer=dict(name='adam', lr=1e-2),
        ema=dict(slow=0.9),
        steps=int(steps),
        batch_size=4,
        log_every=1,
        checkpoint_every=4,
    )
    return config
