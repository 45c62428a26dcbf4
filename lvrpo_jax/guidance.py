"""Classifier-free guidance of rollouts, and of what is trained on their steps.

A guided policy draws by other velocities than the plain one, so its steps have to be replayed, and
its reference asked, with the same scale (arXiv 2505.05470 samples and trains guided; objectives on
final images alone train the plain policy and may draw in any way).
"""

from __future__ import annotations

import jax

from lvrpo_jax import flow
from lvrpo_jax import policy as policy_lib
from lvrpo_jax import types
from lvrpo_jax.rollouts import image

Array = jax.Array


def velocity(policy: policy_lib.Policy, params: types.Params, cache: types.Cache,
             bare: types.Cache | None, scale: float) -> image.Velocity:
  """The policy that samples: guided where `bare`, the contexts without their texts, is given."""
  plain = lambda x, t: policy.velocity(params, cache, x, t)
  if bare is None:
    return plain
  return lambda x, t: flow.classifier_free(plain(x, t), policy.velocity(params, bare, x, t), scale)


def follow(policy: policy_lib.Policy, params: types.Params, vae_params: types.Params,
           prompts: dict[str, types.Prompts], x: dict[str, Array], time: dict[str, Array],
           scales: dict[str, Array | None], ids: dict[str, Array]
           ) -> tuple[dict[str, Array], dict[str, Array]]:
  """`Policy.follow` with guided velocities of the tasks that have scales (B, M)."""
  guided = {task: scale_BM for task, scale_BM in scales.items() if scale_BM is not None}
  bare = lambda tree: {f'{task}/bare': tree[task] for task in guided}
  without = {name: policy_lib.without_prompt(p) for name, p in bare(prompts).items()}
  v, logits = policy.follow(params, vae_params, {**prompts, **without}, {**x, **bare(x)},
                            {**time, **bare(time)}, ids)
  for task, scale_BM in guided.items():
    v[task] = flow.classifier_free(v[task], v.pop(f'{task}/bare'), scale_BM[..., None, None])
  return v, logits
