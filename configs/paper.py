"""The default job with the method in the form that the paper gives it (arXiv 2603.27693).

    python -m lvrpo_jax.main --config=configs/paper.py

Rules give all or nothing. Rewards of equal weight are summed, and the sum is divided by its
deviation in the group, however small that is. The objective is GRPO's clipped ratio, on every token
of an answer (with the same weight for each answer) and on replayed steps of the sampler. For
answers the paper compares the input image with the question. That reward is constant in a group and
has no gradient, so its weight is 0 here. Learning rates, sampler and weights of the penalties,
which the paper does not state, are those of the default job.
"""

from configs import base


def _rewards(*names: str) -> dict[str, dict]:
  """Returns settings with weight 1 for the rewards named and 0 for others; rules are not graded."""
  weights = {name: dict(weight=float(name in names)) for name in ('rules', 'semantic', 'knowledge')}
  weights['rules']['graded'] = False
  return weights


CHANGES = dict(
  align=dict(
    advantage=dict(method='sum_then_normalize', floor=1e-6),
    image=dict(objective='flow_grpo'),
    text=dict(objective='grpo', clip_high=0.2),
    rewards=dict(
      generate=_rewards('rules', 'semantic', 'knowledge'),
      understand=_rewards('rules', 'knowledge'),
      edit=_rewards('rules', 'semantic', 'knowledge'),
    ),
  )
)
"""Changes to the default job."""


def get_config() -> base.Config:
  """Returns the configuration."""
  config = base.get_config()
  config.update(CHANGES)
  return config
