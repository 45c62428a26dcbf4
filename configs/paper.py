"""The default job with the method in the form that the paper gives it (arXiv 2603.27693).

    python -m lvrpo_jax.main --config=configs/paper.py

Rules pay all or nothing, components of equal weight are summed, and the sum is divided by its
deviation in the group, however small that is. The objective is GRPO's clipped ratio, on every token
of an answer (each answer counting the same) and on replayed steps of the sampler. For answers the
paper compares the input image with the question; in a group that is constant, and what is constant
teaches nothing, so it has no weight here. Rates, sampler and weights of the penalties, which the
paper leaves open, are those of the default job.
"""

from configs import base


def _rewards(*names):
  """Rewards of weight 1; rules pay all or nothing."""
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
"""To the default job."""


def get_config():
  """Returns the configuration."""
  config = base.get_config()
  config.update(CHANGES)
  return config
