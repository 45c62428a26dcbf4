"""One answer, picture or edit from the command line.

    python -m lvrpo_jax.main --config=configs/base.py --config.program=sample \
        --config.sample.prompt='a photo of a red circle left of a blue square'
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import logging
import jax

from lvrpo_jax import flow
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import packing
from lvrpo_jax.rollouts import generator
from lvrpo_jax.rollouts import guidance as guidance_lib
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import weights


def image_size(model: generator.Model, wanted: tuple[int, int]) -> tuple[int, int]:
  """(Y, X) of a new image, from (width, height) with 0 for the model's own size.

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


def run(config: Any, workdir: pathlib.Path) -> dict[str, str]:
  """Answers or draws, and writes `<workdir>/samples/<number>.{txt,png}`.

  Returns:
    What was made: 'thought', 'answer' and 'image' (a path), each where there is one.

  Raises:
    ValueError: the image cannot be read, the size does not fit, or there is no model.
  """
  s = config.sample
  if not s.prompt:
    raise ValueError("config.sample.prompt is ''; allowed: a text")
  if s.task == 'edit' and not s.image:
    raise ValueError("config.sample.image is ''; allowed: the file of the image to edit")
  source = image_files.load_image(s.image) if s.image else None
  experiment = experiment_lib.build(config, workdir)
  params, vae_params = weights.load_newest(experiment)
  model = generator.Model(experiment.policy, experiment.data.tokenizer, params, vae_params, s.buckets)
  size = image_size(model, tuple(s.size))
  system = s.system[s.task] if s.think else ''
  draw_key, text_key, encode_key = jax.random.split(jax.random.key(config.seed), 3)
  contexts, edited = model.contexts(s.task, s.prompt, source, system, encode_key)
  out = {}
  if s.think or s.task == 'understand':
    decoding = generator.Decoding(s.max_tokens, s.temperature, s.top_p)
    ids = model.answer(contexts.main, decoding, text_key)
    text = model.tokenizer.decode(ids)
    logging.info('%s: %s', 'answer' if s.task == 'understand' else 'thought', text)
    if s.task == 'understand':
      return write(workdir, {'answer': text})
    out['thought'] = text
    contexts = contexts._replace(main=[*contexts.main, packing.Text(ids)])
  g = s.guidance[s.task]
  guidance = guidance_lib.Guidance(
    g.text_scale, g.image_scale, g.low, g.high, g.renorm, g.renorm_min
  )
  with metrics_lib.Progress('sample', s.steps, interval=config.log_every) as progress:
    image = model.draw(
      contexts,
      edited or size,
      guidance,
      flow.time_grid(s.steps + 1, s.shift),
      draw_key,
      lambda step: progress.update(step, {}),
    )
  return write(workdir, {**out, 'image': image})


def write(workdir: pathlib.Path, made: dict[str, Any]) -> dict[str, str]:
  """Writes what was made under the next free number."""
  folder = workdir / 'samples'
  folder.mkdir(parents=True, exist_ok=True)
  taken = [int(path.stem) for path in folder.iterdir() if path.stem.isdigit()]
  stem = folder / f'{max(taken, default=-1) + 1:04d}'
  out = {name: value for name, value in made.items() if name != 'image'}
  if out:
    stem.with_suffix('.txt').write_text('\n'.join(out.values()) + '\n')
  if 'image' in made:
    out['image'] = str(stem.with_suffix('.png'))
    image_files.save_png(out['image'], made['image'])
    logging.info('image: %s', out['image'])
  return out
