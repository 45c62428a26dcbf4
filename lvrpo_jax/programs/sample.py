"""Samples one answer, image or edit from the command line.

    python -m lvrpo_jax.main --config=configs/base.py --config.program=sample \
        --config.sample.prompt='a photo of a red circle left of a blue square'
"""

from __future__ import annotations

import pathlib

from absl import logging
import jax
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import types
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import packing
from lvrpo_jax.data import tasks
from lvrpo_jax.models.bagel import policy as bagel_policy
from lvrpo_jax.rollouts import generator
from lvrpo_jax.rollouts import guidance as guidance_lib
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import weights


def image_size(model: generator.Model, wanted: tuple[int, int]) -> tuple[int, int]:
  """Returns (Y, X) of a new image, from (width, height) with 0 for the model's own size.

  Raises:
    ValueError: a side does not fit the latent tokens or the position table.
  """
  rule = model.rules.latent
  width, height = (side or rule.max_side for side in wanted)
  for side in (width, height):
    if side % rule.stride or not 0 < side <= rule.max_side:
      raise ValueError(
        f'config.sample.size is {tuple(wanted)}; allowed: multiples of '
        f'{rule.stride} up to {rule.max_side} pixels'
      )
  return height, width


def _build_model(config: types.Config, workdir: pathlib.Path) -> generator.Model:
  """Builds the generator of the newest weights.

  Raises:
    ValueError: there are no weights, or the model family has no generator.
  """
  experiment = experiment_lib.build(config, workdir)
  policy = experiment.policy
  if not isinstance(policy, bagel_policy.Policy):
    raise ValueError(
      f"config.model.family is {config.model.family!r}; allowed with config.program = 'sample': "
      "'bagel', or a family that builds its policies"
    )
  params, vae_params = weights.load_newest(experiment)
  return generator.Model(
    policy, experiment.data.tokenizer, params, vae_params, config.sample.buckets
  )


def run(config: types.Config, workdir: pathlib.Path) -> dict[str, str]:
  """Answers, generates or edits, and writes `<workdir>/samples/<index>.{txt,png}`.

  Returns:
    The results: 'thought', 'answer' and 'image' (a path), each where there is one.

  Raises:
    ValueError: the image cannot be read, the size does not fit, or there is no model.
  """
  settings, task = config.sample, config.sample.task
  if not settings.prompt:
    raise ValueError("config.sample.prompt is ''; allowed: a text")
  if task == tasks.EDIT and not settings.image:
    raise ValueError("config.sample.image is ''; allowed: the file of the image to edit")
  source = image_files.load_image(settings.image) if settings.image else None
  model = _build_model(config, workdir)
  size = image_size(model, tuple(settings.size))
  system = settings.system[task] if settings.think else ''
  draw_key, text_key, encode_key = jax.random.split(jax.random.key(config.seed), 3)
  contexts, edited = model.contexts(task, settings.prompt, source, system, encode_key)
  texts: dict[str, str] = {}
  if settings.think or task == tasks.UNDERSTAND:
    decoding = generator.Decoding(settings.max_tokens, settings.temperature, settings.top_p)
    ids = model.answer(contexts.main, decoding, text_key)
    text = model.tokenizer.decode(ids)
    name = 'answer' if task == tasks.UNDERSTAND else 'thought'
    logging.info('%s: %s', name, text)
    texts[name] = text
    if task == tasks.UNDERSTAND:
      return write(workdir, texts)
    contexts = contexts._replace(main=[*contexts.main, packing.Text(ids)])
  scales = settings.guidance[task]
  guidance = guidance_lib.Guidance(
    scales.text_scale, scales.image_scale, scales.low, scales.high, scales.renorm, scales.renorm_min
  )
  with metrics_lib.Progress('sample', settings.steps, interval=config.log_every) as progress:
    image = model.draw(
      contexts,
      edited or size,
      guidance,
      flow.time_grid(settings.steps + 1, settings.shift),
      draw_key,
      lambda step: progress.update(step, {}),
    )
  return write(workdir, texts, image)


def write(
  workdir: pathlib.Path, texts: dict[str, str], image_YXC: np.ndarray | None = None
) -> dict[str, str]:
  """Writes texts and an image under the next free index; returns the texts and the image's path."""
  folder = workdir / 'samples'
  folder.mkdir(parents=True, exist_ok=True)
  taken = [int(path.stem) for path in folder.iterdir() if path.stem.isdigit()]
  stem = folder / f'{max(taken, default=-1) + 1:04d}'
  out = dict(texts)
  if texts:
    stem.with_suffix('.txt').write_text('\n'.join(texts.values()) + '\n')
  if image_YXC is not None:
    out['image'] = str(stem.with_suffix('.png'))
    image_files.save_png(out['image'], image_YXC)
    logging.info('image: %s', out['image'])
  return out
