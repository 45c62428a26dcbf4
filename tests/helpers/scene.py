"""A tiny experiment with samples of all its tasks, for tests of rewards."""

import pathlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax.rewards import base
from lvrpo_jax.rewards import scorer as scorer_lib
from lvrpo_jax.rewards.remote import pending
from lvrpo_jax.rollouts import engine
from lvrpo_jax.runtime import experiment as experiment_lib
from tests.helpers import noise

ROWS, GROUP = 3, 4
NOBODY = pending.PendingRewards({}, lambda: None)
"""What is awaited of servers where none is asked."""
WORDS = ('red', 'two', 'yes', 'circle')
"""Answers of every group."""


def build(weights=None, rewards=None, **changes) -> experiment_lib.Experiment:
  """Builds the tiny experiment.

  Args:
    weights: of the built-in rewards, for every task that has them; 0 where they are not named.
    rewards: entries of `config.align.rewards.<task>` by task and name, added to these.
    **changes: to `config.align`.
  """
  config = tiny.get_config()
  config.model.depth = 1
  align = config.align
  align.rollout.group_size = GROUP
  align.prompts.update(dict.fromkeys(('generate', 'understand', 'edit'), ROWS))
  for entries in align.rewards.values():
    for name, entry in entries.items():
      entry.weight = (weights or {}).get(name, 0.0)
  for task, entries in (rewards or {}).items():
    align.rewards[task].update(entries)
  align.update(changes)
  return experiment_lib.build(config, pathlib.Path('unused'))


class Scene:
  """An experiment with a scorer, frozen parameters at random, and samples of all its tasks."""

  def __init__(self, weights=None, rewards=None, frozen=None, **changes):
    """Builds all of it.

    Args:
      weights, rewards, **changes: see `build`.
      frozen: in the place of some of `base.RewardParams`.
    """
    self.experiment = build(weights, rewards, **changes)
    reference, vae, dual_encoder = noise.parameters(self.experiment)
    self.frozen = base.RewardParams(reference, vae, dual_encoder).replace(**(frozen or {}))
    self.scorer = scorer_lib.Scorer(self.experiment)
    self.scorer.load(self.frozen)
    rng = np.random.default_rng(1)
    side = self.experiment.policy.image_size
    self.pixels = jnp.asarray(rng.integers(0, 256, (ROWS, GROUP, side, side, 3)), jnp.uint8)
    length = self.experiment.config.data.answer_tokens + 1
    self.tokens = jnp.full((ROWS, GROUP, length), self.experiment.policy.eos, jnp.int32)
    self.say([WORDS] * ROWS)

  @property
  def data(self) -> Any:
    """The data source."""
    return self.experiment.data

  def say(self, words_BG) -> None:
    """Gives every sample of `understand` an answer of one word."""
    encode = self.data.tokenizer.encode
    said = [[encode(word)[0] for word in row] for row in words_BG]
    self.tokens = self.tokens.at[:, :, 0].set(np.array(said))

  def examples(self, task, split='align', first=0, category='') -> list[Any]:
    """Examples of the data."""
    return [self.data.example(task, split, first + i, category) for i in range(ROWS)]

  def prompts(self, task, examples=None) -> engine.PromptBatch:
    """Prompts of a task, of the data or of `examples`."""
    examples = self.examples(task) if examples is None else examples
    prompts = self.experiment.encoder(task, examples).prompts
    return engine.PromptBatch({task: examples}, {task: self.experiment.place(prompts)})

  def score(self, task, examples=None, iteration=1) -> scorer_lib.Scored:
    """Rewards and facts of the samples of a task."""
    batch = self.prompts(task, examples)
    outputs = self.tokens if task == 'understand' else self.pixels
    samples = self.scorer.samples(task, batch.examples[task], outputs, iteration)
    return self.scorer.score(samples, batch.prompts[task], self.frozen, NOBODY)

  def values(self, task, examples=None, iteration=1) -> dict[str, np.ndarray]:
    """Values (B, G) of the rewards of a task by name."""
    scored = self.score(task, examples, iteration)
    return {name: np.asarray(x.value_BG) for name, x in scored.rewards.items()}

  def embed(self, images=None, texts=None) -> tuple[Any, Any]:
    """Unit vectors of images (R, Y, X, C) in uint8 with their patches, and of texts.

    They come straight from the module, whose inputs are made here.
    """
    module, params = self.experiment.dual_encoder.module, {'params': self.frozen.dual_encoder}
    apply = jax.jit(module.apply, static_argnames='method')
    image = text = None
    if images is not None:
      pixels = np.asarray(images, np.float32) / 127.5 - 1.0
      image = tuple(map(np.asarray, apply(params, pixels, method='embed_image')))
    if texts is not None:
      tokenizer, length = self.data.tokenizer, module.text_config.max_positions
      ids = np.full((len(texts), length), tokenizer.eos, np.int32)
      for row, words in zip(ids, map(tokenizer.encode, texts)):
        row[: len(words)] = words
      text = np.asarray(apply(params, ids, method='embed_text')[0])
    return image, text
