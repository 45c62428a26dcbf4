"""Runs the production updates and rollouts on eight devices; `multi_device_test` reads its output.

Not a test by itself: the number of devices has to be set before JAX starts. It prints one JSON
object: for every case the largest difference from one device, and sizes that show it is no
comparison of zeros.
"""

import dataclasses
import functools
import json
import pathlib

import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
import optax

from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.models import attention
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.rollouts import engine as engine_lib
from lvrpo_jax.rollouts import think
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import losses
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib
from lvrpo_jax.training import update as update_lib
from tests.helpers import noise
from tests.training import step_test

ROWS, GROUP = 8, 2
TASKS = tasks_lib.TASKS
ALL = (*TASKS, tasks_lib.PLAN)
MESHES = {
  'data': ((8, 1, 1), 'jit'),
  'fsdp': ((1, 8, 1), 'jit'),
  'mixed': ((2, 2, 2), 'jit'),
  'pmap': ((8, 1, 1), 'pmap'),
}
BATCHES = {
  'mixed': ALL,
  'text': (tasks_lib.UNDERSTAND,),
  'image': (tasks_lib.GENERATE,),
  'edit': (tasks_lib.EDIT,),
  'thinking': (tasks_lib.PLAN, tasks_lib.THINK_GENERATE),
}
"""Tasks that count in an update; samples of the others have no weight, and shapes stay."""


def make_config():
  """The tiny experiment with eight rows of all tasks and widths that divide by eight."""
  config = tiny.get_config()
  config.model.update(depth=1)
  config.align.prompts.update(dict.fromkeys(TASKS, ROWS))
  # Thinking has answers too.
  config.pretrain.rows.update(generate=ROWS, understand=0, edit=0, think_generate=ROWS)
  config.align.update(rollout=dict(group_size=GROUP, steps=3, window=1))
  config.data.update(answer_tokens=11, options=dict(chatty=0.0, plan=0.0, describe=0.0))
  return config


def make_batch(experiment, prompts):
  """What an update reads, with numbers at random."""
  rng = np.random.default_rng(1)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  N, C = experiment.policy.latent_shape
  T, K = experiment.config.data.answer_tokens + 1, 1
  tokens = rng.integers(0, len(experiment.data.tokenizer), (ROWS, GROUP, T)).astype(np.int32)
  valid = np.ones((ROWS, GROUP), bool)
  valid[1] = False  # A whole group has failed, so devices hold unlike weights.

  def text(task):
    sampled = types.SampledTexts(
      prompts=prompts[task],
      tokens_BGT=tokens,
      logp_BGT=-np.abs(normal(ROWS, GROUP, T)) - 3.0,
      mask_BGT=rng.random((ROWS, GROUP, T)) < 0.7,
      temperature_B=np.ones(ROWS, np.float32),
    )
    return types.TextTrainBatch(
      sampled=sampled,
      reference_BGT=-np.abs(normal(ROWS, GROUP, T)) - 3.0,
      advantage_BG=normal(ROWS, GROUP),
      valid_BG=valid,
    )

  def x():
    return normal(ROWS, K, GROUP, N, C)

  def time(low):
    return rng.uniform(low, low + 0.2, (ROWS, K, GROUP)).astype(np.float32)

  steps = types.Transitions(
    x_BKGNC=x(),
    next_BKGNC=x(),
    time_BKG=time(0.6),
    next_time_BKG=time(0.3),
    first_time_BKG=time(0.7),
    eta_BKG=time(0.5),
    noise_BKGNC=x(),
    mean_BKGNC=x(),
    std_BKG=time(0.1),
  )

  def image(task):
    sampled = types.SampledImages(
      prompts=prompts[task],
      latents_BGNC=normal(ROWS, GROUP, N, C),
      steps=steps,
      scale_BKG=np.ones((ROWS, K, GROUP), np.float32),
    )
    return types.ImageTrainBatch(
      sampled=sampled,
      query=types.FlowQuery(prompts=prompts[task], x_BKGNC=x(), time_BKG=time(0.5)),
      old_BKGNC=x(),
      reference_BKGNC=x(),
      advantage_BG=normal(ROWS, GROUP),
      valid_BG=valid,
    )

  halves = text(tasks_lib.THINK_GENERATE), image(tasks_lib.THINK_GENERATE)
  understand, generate, edit = (
    text(tasks_lib.UNDERSTAND),
    image(tasks_lib.GENERATE),
    image(tasks_lib.EDIT),
  )
  scale_BKG = np.linspace(1.5, 4.0, ROWS * K * GROUP, dtype=np.float32).reshape(ROWS, K, GROUP)
  return {
    tasks_lib.UNDERSTAND: understand,
    tasks_lib.GENERATE: generate,
    # The branch without the text has rows of its own.
    tasks_lib.EDIT: edit.replace(
      query=types.GuidedFlowQuery(**vars(edit.query), scale_BKG=scale_BKG)
    ),
    **jax.tree.map(
      np.asarray, split_halves(*halves, experiment.policy.bos, normal(ROWS, GROUP), valid)
    ),
  }


def split_halves(text, image, bos, advantage_BG, valid_BG):
  """Plans and their images as the update reads them, every image with a context of its own."""

  def alone(x_BKG):
    return np.moveaxis(x_BKG, 2, 1).reshape(-1, x_BKG.shape[1], 1, *x_BKG.shape[3:])

  sampled = think.SampledPlans(text.sampled, image.sampled)
  halves = think.split_halves(sampled, bos, advantage_BG, valid_BG)
  texts, text_advantage_BG, text_valid_BG = halves[tasks_lib.PLAN]
  images, image_advantage_BG, image_valid_BG = halves[tasks_lib.THINK_GENERATE]
  return {
    tasks_lib.PLAN: text.replace(
      sampled=texts, advantage_BG=text_advantage_BG, valid_BG=text_valid_BG
    ),
    tasks_lib.THINK_GENERATE: types.ImageTrainBatch(
      sampled=images,
      query=types.FlowQuery(
        prompts=images.prompts,
        x_BKGNC=alone(image.query.x_BKGNC),
        time_BKG=alone(image.query.time_BKG),
      ),
      old_BKGNC=alone(image.old_BKGNC),
      reference_BKGNC=alone(image.reference_BKGNC),
      advantage_BG=image_advantage_BG,
      valid_BG=image_valid_BG,
    ),
  }


def only(batch, tasks):
  """The batch in which the samples of other tasks have no weight."""
  return {
    task: b if task in tasks else b.replace(valid_BG=np.zeros_like(b.valid_BG))
    for task, b in batch.items()
  }


def run_updates(loss, params, vae_params, batches, shape, runner, count, **parts):
  """One optimizer step for every batch on the first `count` devices.

  Returns:
    By batch, as NumPy: parameters, gradients, metrics.
  """
  mesh = mesh_lib.make_mesh(shape, jax.devices()[:count])
  # Adam divides by the gradient's size; a large eps keeps rounding noise of tiny gradients small.
  optimizer = optax.chain(
    optax.trace(0.0),
    optimizer_lib.build(
      kind='adamw',
      learning_rate=optimizer_lib.schedule('constant', 1e-2, 10, 1),
      b1=0.9,
      b2=0.98,
      eps=1e-2,
      weight_decay=0.01,
      clip_norm=1.0,
    ),
  )
  step = step_lib.compile_step(loss, optimizer, mesh, runner=runner, **parts)
  out = {}
  for name, batch in batches.items():
    state = placement.shard_state(step_lib.init(jax.tree.map(jnp.array, params), optimizer), mesh)
    if runner == 'jit':
      batch = placement.shard_rows(batch, mesh)
      split = not state.params['lm_head']['kernel'].is_fully_replicated
      assert split == (shape[1] * shape[2] > 1), shape
    state, metrics = step(state, {'vae': vae_params}, batch)
    out[name] = jax.tree.map(np.asarray, (state.params, state.opt_state[0].trace, metrics))
  return out


def difference(one, two):
  """Largest absolute difference of two trees."""
  return max(
    float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  )


def largest(tree):
  return max(float(np.max(np.abs(x))) for x in jax.tree.leaves(tree))


def together(parts):
  """One loss of several, each on its own part of the batch: half the programs to compile."""

  def label(results):
    return {
      f'{name}/{key}': value for name, result in results.items() for key, value in result.items()
    }

  def sums(params, state, frozen, batch):
    found = {name: loss.sums(params, state, frozen, batch[name]) for name, loss in parts.items()}
    return tuple(label({name: pair[i] for name, pair in found.items()}) for i in range(2))

  return step_lib.Loss(
    lambda batch: label({name: loss.weights(batch[name]) for name, loss in parts.items()}),
    sums,
    label({name: loss.coefficients for name, loss in parts.items()}),
  )


def updates(experiment, params, vae_params, batches):
  """The losses on every mesh against one device."""
  p = experiment.config.pretrain
  loss = together(
    {
      'pretrain': losses.pretraining(
        experiment.policy, p.task_weights, p.draws, p.shift, experiment.config.seed
      ),
      'align': update_lib.alignment_loss(experiment),
    }
  )
  batches = {
    name: dict(batches, align=only(batches['align'], tasks)) for name, tasks in BATCHES.items()
  }
  one = run_updates(loss, params, vae_params, batches, (1, 1, 1), 'jit', 1)
  out = {
    'one': {
      name: dict(
        metrics={k: float(v) for k, v in metrics.items()},
        moved=difference(got, params),
        gradient=largest(gradients),
      )
      for name, (got, gradients, metrics) in one.items()
    }
  }
  for mesh, (shape, runner) in MESHES.items():
    out[mesh] = {
      name: dict(
        params=difference(got, one[name][0]),
        gradients=difference(gradients, one[name][1]),
        metrics={k: float(v) for k, v in metrics.items()},
      )
      for name, (got, gradients, metrics) in run_updates(
        loss, params, vae_params, batches, shape, runner, 8
      ).items()
    }
  return out


def parts(experiment, params, vae_params, batch):
  """The alignment loss in parts of rows and groups, each in one pass, on a mesh."""
  batch = {'all': batch}
  loss = update_lib.alignment_loss
  one = run_updates(loss(experiment), params, vae_params, batch, (1, 1, 1), 'jit', 1)
  joint = dataclasses.replace(experiment, policy=dataclasses.replace(experiment.policy, joint=True))
  got = run_updates(
    loss(joint), params, vae_params, batch, (2, 2, 1), 'jit', 4, micro_batches=2, group_parts=GROUP
  )
  return {
    'parts': dict(
      params=difference(got['all'][0], one['all'][0]),
      gradients=difference(got['all'][1], one['all'][1]),
    )
  }


def linear():
  """Two donated steps of a linear model under pmap, in parts, against one device."""
  one, (four, gone) = step_test.two_steps(1)[0], step_test.two_steps(4, 'pmap', micro_batches=2)
  return {'linear': dict(difference=difference(one, four), donated=gone)}


def rollouts(experiment, params, vae_params, prompts):
  """Samples of one device and of eight."""
  found, other_params = {}, jax.tree.map(lambda x: 0.9 * x, params)
  shapes = {
    'one': (1, 1, 1),
    **{mesh: shape for mesh, (shape, runner) in MESHES.items() if runner == 'jit'},
    'apart': MESHES['mixed'][0],
  }
  for name, shape in shapes.items():
    mesh = mesh_lib.make_mesh(shape, jax.devices()[: 1 if name == 'one' else 8])
    placed = dataclasses.replace(experiment, mesh=mesh)
    if name == 'apart':
      config = ml_collections.ConfigDict(experiment.config)
      config.parallel.rollout_mesh = (4, 1, 2)
      placed = dataclasses.replace(placed, config=config)
      assert placed.rollout_mesh is not mesh
    batch = engine_lib.PromptBatch({}, {task: placed.place(p) for task, p in prompts.items()})
    # Texts and images by policies of their own.
    policies = tuple(placement.shard_state(tree, mesh) for tree in (params, other_params))
    engine = engine_lib.RolloutEngine(placed, apart=False)
    found[name] = jax.tree.map(
      np.asarray, engine.rollout(policies, placement.shard_state(vae_params, mesh), batch, 3)
    )
  texts, images, pixels = found.pop('one')
  tokens = {task: text.tokens_BGT for task, text in texts.items()}

  def logp(texts):
    return {task: text.logp_BGT for task, text in texts.items()}

  return {
    'rollout': {
      name: dict(
        tokens=sum(int(np.sum(tokens[task] != text.tokens_BGT)) for task, text in others.items()),
        logp=difference(logp(texts), logp(others)),
        latents=difference(images, other_images),
        pixels=difference(pixels, other_pixels),
      )
      for name, (others, other_images, other_pixels) in found.items()
    },
    'samples': dict(
      distinct_texts=min(
        len(np.unique(x.reshape(ROWS * GROUP, -1), axis=0)) for x in tokens.values()
      ),
      deviation=min(float(np.std(x.latents_BGNC, axis=(0, 1)).min()) for x in images.values()),
    ),
  }


def kernels():
  """Splash attention, interpreted, on a mesh that splits rows and heads, against the plain one."""
  B, M, L, S, H, J, K = 4, 1, 72, 40, 4, 2, 16
  rng = np.random.default_rng(2)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  arrays = (
    normal(B, M, L, H, K),
    [(normal(B, S, J, K), normal(B, S, J, K)), (normal(B, M, L, J, K), normal(B, M, L, J, K))],
  )
  keys = jnp.asarray(rng.random((B, S)) < 0.7)
  dense = jnp.asarray(rng.random((B, 1, L, L)) < 0.4) | jnp.eye(L, dtype=bool)
  factor = normal(B, M, L, H, K)

  def run(attend, masks, arrays):
    def total(arrays):
      q, kv = arrays
      out = attend(q, [attention.Block(k, v, mask) for (k, v), mask in zip(kv, masks)])
      return jnp.sum(factor * out), out

    return jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)

  mesh, found = mesh_lib.make_mesh((2, 2, 2)), {}
  for name, mask in (('causal', attention.Mask(causal=True)), ('dense', attention.Mask(dense))):
    masks = attention.Mask(keys=keys), mask
    (_, out), gradients = run(attention.attend_xla, masks, arrays)
    with mesh_lib.scope(mesh):
      (_, got), others = run(
        functools.partial(attention.attend_splash, interpret=True),
        masks,
        placement.shard_rows(arrays, mesh),
      )
    assert got.sharding.spec[0] and got.sharding.spec[3] == 'tensor', got.sharding
    found[name] = dict(
      output=difference(out, got),
      gradients=difference(gradients, others),
      largest=largest((out, gradients)),
    )
  return {'kernels': found}


def main():
  assert len(jax.devices()) == 8, jax.devices()
  experiment = experiment_lib.build(make_config(), pathlib.Path('unused'))
  params, vae_params = noise.parameters(experiment, 0.2)[:2]

  def encode(task, split):
    return experiment.encoder(
      task, [experiment.data.example(task, split, index) for index in range(ROWS)]
    )

  prompts = {task: encode(task, 'align').prompts for task in TASKS}
  batches = {
    'pretrain': {
      task: encode(task, 'pretrain') for task in tasks_lib.active(experiment.config.pretrain.rows)
    },
    'align': make_batch(experiment, prompts),
  }
  out = {
    **updates(experiment, params, vae_params, batches),
    **parts(experiment, params, vae_params, batches['align']),
    **linear(),
    **rollouts(experiment, params, vae_params, prompts),
    **kernels(),
  }
  print(json.dumps(out))


if __name__ == '__main__':
  main()
