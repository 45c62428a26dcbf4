"""The default job with rewards and advantages in the form that the paper gives them.

    python -m lvrpo_jax.main --config=configs/paper.py

Rules pay all or nothing, components of equal weight are summed, and the sum is divided by its
deviation in the group, however small that is. For answers the paper compares the input image with the
question; in a group that is constant, and what is constant teaches nothing, so it has no weight here.
Sampler, objective and penalties are those of the default job.
"""

from configs import base

CHANGES = dict(align=dict(
    advantage='sum', floor=1e-6, graded=False, rewards=dict(
        generate=dict(rules=1., semantic=1., knowledge=1.),
        understand=dict(rules=1., semantic=0., knowledge=1.),
        edit=dict(rules=1., semantic=1., knowledge=1.))))
"""To the default job."""


def get_config():
  """Returns the configuration."""
  config = base.get_config()
  config.update(CHANGES)
  return config
