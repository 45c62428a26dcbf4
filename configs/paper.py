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

CHANGES = dict(
  align=dict(
    advantage='sum',
    floor=1e-6,
    graded=False,
    objective='sde',
    text_objective='grpo',
    text_high=0.2,
    rewards=dict(
      generate=dict(rules=1.0, semantic=1.0, knowledge=1.0),
      understand=dict(rules=1.0, semantic=0.0, knowledge=1.0),
      edit=dict(rules=1.0, semantic=1.0, knowledge=1.0),
    ),
  )
)
"""To the default job."""


def get_config():
  """Returns the configuration."""
  config = base.get_config()
  config.update(CHANGES)
  return config
