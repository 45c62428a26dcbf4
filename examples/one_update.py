"""One update of LVRPO in plain view: model, rollout, reward, advantage, update.

python -m examples.one_update
"""

import pathlib

import jax
from jax import numpy as jnp
import numpy as np
import optax

from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.objectives import advantage
from lvrpo_jax.rollouts import engine as engine_lib
from lvrpo_jax.rollouts import replay
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import losses
from lvrpo_jax.training import step as step_lib


def main() -> dict[str, float]:
  """Draws images for two captions and pushes the policy towards the brighter ones."""
  config = tiny.get_config()
  config.align.image.objective = 'flow_grpo'  # The clipped ratio of denoising steps.
  config.align.prompts.update(generate=2, understand=0, edit=0)
  experiment = experiment_lib.build(config, pathlib.Path('unused'))
  policy = experiment.policy
  params = policy.init(jax.random.key(0))
  vae = policy.fit_autoencoder(experiment.data.images(200), seed=0)

  examples = [experiment.data.example('generate', 'align', index) for index in range(2)]
  prompts = experiment.encoder('generate', examples).prompts
  engine = engine_lib.RolloutEngine(experiment, apart=False)
  batch = engine_lib.PromptBatch({'generate': examples}, {'generate': prompts})
  rollouts = engine.rollout((params,), vae, batch, iteration=1)
  trajectory = rollouts.images['generate']
  brightness_BG = np.asarray(rollouts.pixels['generate'], np.float32).mean((2, 3, 4)) / 255
  rewards = {'brightness': types.Rewards(jnp.asarray(brightness_BG), jnp.ones((2, 2), bool))}
  credit = advantage.combine(rewards, {'brightness': 1.0}, 'normalize_then_sum', floor=1e-3)

  steps = replay.transitions(trajectory, engine.kept_steps(1), engine.grid, engine.levels_T)
  sampled = replay.sampled_images(prompts, trajectory, steps)
  query = replay.step_query(sampled, guided=False)
  frozen = {'vae': vae}
  reference = replay.velocities(policy, params, frozen, {'generate': query})['generate']
  train = types.ImageTrainBatch(
    sampled, query, credit.value_BG, credit.valid_BG, old_BKGNC=reference, reference_BKGNC=reference
  )

  loss, optimizer = losses.alignment(policy, config.align), optax.adam(1e-3)
  update = jax.jit(step_lib.make_step(loss, optimizer))
  state, metrics = update(step_lib.init(params, optimizer), frozen, {'generate': train})
  return {'step': int(state.step), **{name: float(value) for name, value in metrics.items()}}


if __name__ == '__main__':
  print(main())
