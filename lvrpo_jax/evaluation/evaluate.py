"""Scores a policy on held-out prompts, with the same prompts and noise before and after alignment.

The detector of `config.evaluate` is built differently from that of the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from lvrpo_jax import symbols
from lvrpo_jax import types
from lvrpo_jax.data import detection
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import over_optimization
from lvrpo_jax.evaluation import samplers
from lvrpo_jax.evaluation import scores
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards import rules
from lvrpo_jax.runtime import experiment as experiment_lib

HELD_OUT_FIRST = 100_000
"""Index of the first prompt of `Evaluator.held_out_reward`."""

Records = list[dict[str, types.Json]]
"""Lines of `predictions.jsonl`."""


class PromptSet(NamedTuple):
  """Held-out prompts of one kind."""

  task: str
  split: str
  kind: str
  examples: list[examples_lib.Example]

  def name(self, index: int) -> str:
    """Returns the id of a prompt, with which the names of its files start."""
    return f'{self.task}/{self.split}/{self.kind}/{index:03d}'


class Evaluator:
  """Samples and scores held-out prompts of an experiment."""

  def __init__(self, experiment: experiment_lib.Experiment, vae_params: types.Params):
    self.experiment, self._vae_params = experiment, vae_params
    self._samplers = samplers.build(experiment)
    self._settings = experiment.config.evaluate
    self._detector = symbols.find(
      self._settings.detector, 'config.evaluate.detector', detection.TABLE
    )

  def run(self, params: types.Params, folder: pathlib.Path) -> Records:
    """Samples and scores all prompts, writes images and predictions, and returns the predictions.

    `predictions.jsonl` is written last and in one piece: if it exists, the folder is complete and
    its predictions are returned.
    """
    path = folder / 'predictions.jsonl'
    if multihost.path_exists(path):
      return [json.loads(line) for line in path.read_text().split('\n') if line]
    prompts = self._settings.prompts

    def count(task: str, split: str) -> int:
      return prompts[examples_lib.UNSEEN if split == examples_lib.UNSEEN else task]

    records, image_sets = [], []
    for prompt_set in prompt_sets(self.experiment.data, count):
      if tasks.BY_NAME[prompt_set.task].output == tasks.TEXT:
        part = self._answers(params, prompt_set)
      else:
        part, images_BGYXC = self._images(params, prompt_set)
        image_sets.append(
          (prompt_set.task, prompt_set.split, prompt_set.kind, images_BGYXC, prompt_set.examples)
        )
        _save_images(folder, prompt_set, images_BGYXC, part)
      records.extend(_describe(folder, prompt_set, part))
    records.append(dict(task='panel', panel=over_optimization.measure(image_sets)))
    if jax.process_index() == 0:
      temporary = path.with_suffix('.tmp')
      temporary.write_text(''.join(json.dumps(record) + '\n' for record in records))
      temporary.replace(path)
    return records

  def guided(self, params: types.Params) -> dict[str, types.Json]:
    """Computes generation scores by guidance scale, on fewer prompts of the same kinds.

    The result is empty if `evaluate.guided_prompts` is 0.
    """

    def count(task: str, split: str) -> int:
      generates = (task, split) == (tasks.GENERATE, examples_lib.EVAL)
      return self._settings.guided_prompts if generates else 0

    sets = prompt_sets(self.experiment.data, count)
    out = {}
    for scale in (1.0, *self._settings.guided_scales) if sets else ():
      groups = {}
      for prompt_set in sets:
        records, _ = self._images(params, prompt_set, scale)
        meanings = [example.meaning for example in prompt_set.examples]
        groups[prompt_set.kind] = [np.mean(r['correct']) for r in records], meanings
      out[f'{scale:g}'] = scores.summary(groups, self.experiment.config.seed)
    return out

  def held_out_reward(self, params: types.Params, count: int) -> dict[str, float]:
    """Scores `count` held-out captions of every kind, for use during training.

    None of these captions is among those of `run`, so the scores may decide when a run stops.
    """
    data = self.experiment.data
    examples = [
      data.example(tasks.GENERATE, examples_lib.EVAL, HELD_OUT_FIRST + i, kind)
      for kind in data.categories(tasks.GENERATE, examples_lib.EVAL)
      for i in range(count)
    ]
    images_BGYXC = self._draw(params, self._batches(tasks.GENERATE, examples))
    B, G = images_BGYXC.shape[:2]
    found = self._detector(images_BGYXC.reshape(B * G, *images_BGYXC.shape[2:]))
    specs = rules.targets(tasks.GENERATE, examples, 'evaluation')

    def detected(images_RYXC: np.ndarray) -> Sequence[Sequence[detection.Detection]]:
      del images_RYXC
      return found

    correct, _ = rules.images(detected, images_BGYXC, specs, strict=True)
    groups = [list(map(list, found[b * G : (b + 1) * G])) for b in range(B)]
    return {
      'reward': float(np.mean(correct)),
      'diversity': over_optimization.scene_diversity(groups),
    }

  def _batches(
    self, task: str, examples: Sequence[examples_lib.Example]
  ) -> list[tuple[int, types.Prompts]]:
    """Returns batches (rows that count, prompts) of one shape.

    The last batch is filled up with its own first row.
    """
    experiment = self.experiment
    size = -(-self._settings.batch // experiment.mesh.size) * experiment.mesh.size
    out = []
    for start in range(0, len(examples), size):
      part = list(examples[start : start + size])
      rows = part + [part[0]] * (size - len(part))
      out.append((len(part), experiment.place_copies(experiment.encoder(task, rows).prompts)))
    return out

  def _draw(
    self, params: types.Params, batches: Sequence[tuple[int, types.Prompts]], *guidance: float
  ) -> np.ndarray:
    """Samples uint8 images (B, G, Y, X, 3) of all prompts."""
    return np.concatenate(
      [
        multihost.gather_rows(self._samplers.draw(params, self._vae_params, prompts, *guidance))[
          :rows
        ]
        for rows, prompts in batches
      ]
    )

  def _think(
    self, params: types.Params, batches: Sequence[tuple[int, types.Prompts]], *guidance: float
  ) -> tuple[list[list[str]], np.ndarray]:
    """Samples plans (B, G), and uint8 images (B, G, Y, X, 3) after them."""
    decode = self.experiment.data.tokenizer.decode
    plans, images = [], []
    for rows, prompts in batches:
      tokens_BGT, images_BGYXC = (
        multihost.gather_rows(x)[:rows]
        for x in self._samplers.think(params, self._vae_params, prompts, *guidance)
      )
      plans.extend([decode(ids) for ids in row] for row in tokens_BGT)
      images.append(images_BGYXC)
    return plans, np.concatenate(images)

  def _images(
    self, params: types.Params, prompt_set: PromptSet, *guidance: float
  ) -> tuple[Records, np.ndarray]:
    """Returns records and uint8 images (B, G, Y, X, 3) of prompts of one kind."""
    task, examples = prompt_set.task, prompt_set.examples
    batches, plans = self._batches(task, examples), []
    if tasks.BY_NAME[task].plans:
      plans, images_BGYXC = self._think(params, batches, *guidance)
    else:
      images_BGYXC = self._draw(params, batches, *guidance)
    specs = rules.targets(task, examples, 'evaluation')
    if task == tasks.EDIT:
      source_BYXC = np.stack([_required(example, 'source') for example in examples])
      correct, _ = rules.edits(self._detector, source_BYXC, images_BGYXC, specs, strict=True)
    else:
      correct, _ = rules.images(self._detector, images_BGYXC, specs, strict=True)
    records = [
      dict(spec=spec, correct=row.astype(int).tolist()) for spec, row in zip(specs, correct)
    ]
    for record, row in zip(records, plans):
      record['plans'] = row
    return records, images_BGYXC

  def _answers(self, params: types.Params, prompt_set: PromptSet) -> Records:
    """Returns records of sampled and greedy answers to questions of one kind."""
    data, out = self.experiment.data, []
    decode = data.tokenizer.decode
    for rows, prompts in self._batches(prompt_set.task, prompt_set.examples):
      found = self._samplers.answer(params, self._vae_params, prompts)
      for sampled, greedy in list(zip(*map(multihost.gather_rows, found)))[:rows]:
        out.append(([decode(x) for x in sampled], decode(greedy[0])))
    answers = rules.targets(prompt_set.task, prompt_set.examples, 'evaluation')

    def score(texts_BG: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
      return rules.answers(texts_BG, answers, data.read_answer, data.well_formed)

    correct, well_formed = score([sampled for sampled, _ in out])
    greedy_correct, _ = score([[greedy] for _, greedy in out])
    return [
      dict(
        answer=answers[b],
        samples=samples,
        correct=correct[b].astype(int).tolist(),
        format=well_formed[b].astype(int).tolist(),
        greedy=greedy,
        greedy_correct=int(greedy_correct[b][0]),
      )
      for b, (samples, greedy) in enumerate(out)
    ]


def prompt_sets(data: examples_lib.DataSource, count: Callable[[str, str], int]) -> list[PromptSet]:
  """Returns all held-out prompts, `count(task, split)` of every kind."""
  return [
    PromptSet(
      task=task,
      split=split,
      kind=kind,
      examples=[data.example(task, split, i, kind) for i in range(count(task, split))],
    )
    for task in tasks.TASKS
    for split in (examples_lib.EVAL, examples_lib.UNSEEN)
    for kind in data.categories(task, split)
    if count(task, split)
  ]


def _describe(folder: pathlib.Path, prompt_set: PromptSet, part: Records) -> Records:
  """Adds the prompts to records, and writes the images that questions show."""
  out = []
  for index, (record, example) in enumerate(zip(part, prompt_set.examples)):
    name = prompt_set.name(index)
    if tasks.BY_NAME[prompt_set.task].output == tasks.TEXT:
      record['image'] = _save(folder, f'{name}.png', _required(example, 'source'))
    out.append(
      dict(
        task=prompt_set.task,
        split=prompt_set.split,
        kind=prompt_set.kind,
        id=name,
        prompt=example.prompt,
        meaning=example.meaning,
        **record,
      )
    )
  return out


def _required(example: examples_lib.Example, field: str) -> np.ndarray:
  """Returns the source image or the target image of an example.

  Raises:
    ValueError: the example has none.
  """
  image_YXC = example.source if field == 'source' else example.target
  if image_YXC is None:
    raise ValueError(f'example {example.index} has no {field} image, which the evaluation reads')
  return image_YXC


def _save(folder: pathlib.Path, name: str, image_YXC: np.ndarray) -> str:
  """Writes an image in process 0; returns its name."""
  if jax.process_index() == 0:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image_files.save_png(path, image_YXC)
  return name


def _save_images(
  folder: pathlib.Path, prompt_set: PromptSet, images_BGYXC: np.ndarray, records: Records
) -> None:
  """Writes the images of prompts of one kind, and adds their names to the records."""
  for index, (example, row, record) in enumerate(zip(prompt_set.examples, images_BGYXC, records)):
    name = prompt_set.name(index)
    record['images'] = [_save(folder, f'{name}_{i}.png', image) for i, image in enumerate(row)]
    if prompt_set.task == tasks.EDIT:
      record['source'] = _save(folder, f'{name}_source.png', _required(example, 'source'))
      record['target'] = _save(folder, f'{name}_target.png', _required(example, 'target'))
