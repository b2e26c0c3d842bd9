"""Rewards of answers: jittable functions, and verifiers in Python that run beside the step.

    reward(tokens, mask, batch) -> float32 [B]      tokens int32 [B, R], mask bool [B, R]

with `batch` the fields of the prompts, a row for each answer, and `truncated` bool [B], which came
to no end; where a method learns from it also `reward_keys` [B], for what it draws. A config names
the builder, a block:

    reward=dict(name='kd.rewards.printed.printed')

whose `builder(context, **arguments)` returns the reward. Where a verdict can be computed from
tokens (`kd.rewards.printed`), it is a part of the compiled step. `kd.rewards.host.host` makes a
reward of any function of Python, which judges answers one by one in processes of its own, each
within a time limit: `kd.rewards.words` does so with any function of texts, `kd.rewards.mathematics`
with `math-verify`. `kd.rewards.noisy` makes mistakes with another reward's verdicts.

Worlds that answer turn by turn are environments (`kd.sampling.environment`): `kd.rewards.push` and
`kd.rewards.sokoban` have one each, beside the rewards of what was done in it.

An answer that cannot be judged (a verifier hangs, raises or dies) has the reward NaN, which
`kd.rewards.reward.judged` counts and turns into 0: it is no part of its group, and nothing is
learnt from it.

Programs that a model writes are never run by Python: a verifier reads answers, as text. What asks
for their results needs an interpreter that can do nothing else, as those of the small worlds are;
or `kd.rewards.programs`, which hands them to a verifier of yours, and has none of its own.
"""
