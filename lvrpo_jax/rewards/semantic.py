"""Semantic reward: similarity of images and texts in a dual encoder's joint space.

Axes beyond the common legend: `W` key words of the data, `K` key words of a prompt.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.rewards import base
from lvrpo_jax.runtime import experiment as experiment_lib

Array = jax.Array

WORDS_AT_ONCE = 256
"""Key words in one pass of the text tower."""


def similarity(image_BGD: Array, text_BGD: Array) -> Array:
  """Cosine (B, G) of unit vectors; the text may be one for a whole group (B, 1, D)."""
  return jnp.sum(image_BGD * text_BGD, axis=-1)


def dense(
  patch_BGND: Array, words_WD: Array, row_BK: Array, count_BK: Array, top: int = 1
) -> Array:
  """Mean over the key words of a prompt of their match among the image's patches, (B, G).

  With `top = 1` the match of a word is its cosine with the best patch, LVRPO's form (arXiv
  2603.27693). With `top = k` it is the mean over the k best patches, and one hot patch cannot
  satisfy it: whatever that patch shows, its cosine is at most 1 and makes up 1/k of the mean, so k
  patches have to match. Only the words of a prompt meet its patches, so the largest array has
  shape (B, G, K, N).

  Args:
    patch_BGND: unit vectors of patches, at least `top` of them.
    words_WD: unit vectors of all key words.
    row_BK: the rows of `words_WD` that stand in a prompt.
    count_BK: how often each of them counts; 0 for padding.
    top: number of best patches.
  """
  match_BGKN = jnp.einsum('BGND,BKD->BGKN', patch_BGND, words_WD[row_BK])
  best_BGK = jnp.mean(jax.lax.top_k(match_BGKN, top)[0], axis=-1)
  weight_B1K = count_BK[:, None].astype(jnp.float32)
  return jnp.sum(best_BGK * weight_B1K, axis=-1) / jnp.maximum(jnp.sum(weight_B1K, axis=-1), 1.0)


class Semantic:
  """Similarity of an image and its caption, or of the image shown and the statement of an answer.

  The question of an answer is the same for a whole group: its similarity to the image teaches
  nothing.
  """

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = base.DEVICE

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    del settings
    self._task, self._data, self._encoder = task, experiment.data, experiment.dual_encoder

  def load(self, frozen: base.RewardParams) -> types.Params:
    """The dual encoder is shared."""
    del frozen
    return ()

  def prepare(self, samples: base.Samples) -> base.Prepared:
    """Token ids of the captions (B, L), or of the statements (B, G, L)."""
    if not samples.are_texts:
      return base.Prepared(self._encoder.token_ids([e.prompt for e in samples.examples])[0])
    texts_BG = samples.texts_BG
    answers_BG = [[self._data.read_answer(text) for text in row] for row in texts_BG]
    said = statements(samples.examples, answers_BG, texts_BG)
    ids_RL, cut_R = self._encoder.token_ids(said)
    facts = {'truncated/captions': cut_R.reshape(samples.shape).astype(np.float32)}
    return base.Prepared(ids_RL.reshape(*samples.shape, -1), facts=facts)

  def __call__(
    self,
    params: types.Params,
    frozen: base.RewardParams,
    samples: base.DeviceSamples,
    inputs: types.Tree,
  ) -> Array:
    """Cosines (B, G)."""
    del params
    if tasks.BY_NAME[self._task].output == tasks.TEXT:
      image_BD, _ = self._encoder.embed_image(frozen.dual_encoder, samples.prompts.source_BYXC)
      B, G, L = inputs.shape
      text_RD, _ = self._encoder.embed_text(frozen.dual_encoder, inputs.reshape(B * G, L))
      return similarity(image_BD[:, None], text_RD.reshape(B, G, -1))
    image_BGD, _ = _embed_groups(self._encoder, frozen, samples)
    text_BD, _ = self._encoder.embed_text(frozen.dual_encoder, inputs)
    return similarity(image_BGD, text_BD[:, None])


class Dense:
  """Match of the key words of a caption with the patches of its image, see `dense`."""

  outputs = frozenset((tasks.IMAGE,))
  runs_on = base.DEVICE

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    self._encoder, self._top = experiment.dual_encoder, settings.top
    self._words = sorted(experiment.data.key_words)
    self._most = experiment.config.data.prompt_tokens
    patches = self._encoder.module.vision_config.side**2
    if not 1 <= self._top <= patches:
      raise ValueError(
        f'config.align.rewards.{task}.dense.top is {self._top}; allowed: 1 to the {patches} '
        'patches that the dual encoder cuts an image into'
      )

  def load(self, frozen: base.RewardParams) -> types.Params:
    """Unit vectors (W, D) of the data's key words, sorted, in the joint space."""
    ids_WL, _ = self._encoder.token_ids(self._words)
    # In parts: a data class may know the nouns of a language.
    return jax.lax.map(
      lambda ids_L: self._encoder.embed_text(frozen.dual_encoder, ids_L[None])[0][0],
      jnp.asarray(ids_WL),
      batch_size=WORDS_AT_ONCE,
    )

  def prepare(self, samples: base.Samples) -> base.Prepared:
    """Rows of the key words of every caption, and how often each counts."""
    return base.Prepared(key_words(self._words, [e.prompt for e in samples.examples], self._most))

  def __call__(
    self,
    params: types.Params,
    frozen: base.RewardParams,
    samples: base.DeviceSamples,
    inputs: types.Tree,
  ) -> Array:
    """Matches (B, G)."""
    _, patches_BGND = _embed_groups(self._encoder, frozen, samples)
    return dense(patches_BGND, params, *inputs, top=self._top)


def _embed_groups(
  encoder: experiment_lib.DualEncoder, frozen: base.RewardParams, samples: base.DeviceSamples
) -> tuple[Array, Array]:
  """Embeds groups of images: pooled (B, G, D) and patches (B, G, N, D)."""
  B, G = samples.outputs.shape[:2]
  flat_RYXC = samples.outputs.reshape(B * G, *samples.outputs.shape[2:])
  image_RD, patches_RND = encoder.embed_image(frozen.dual_encoder, flat_RYXC)
  return image_RD.reshape(B, G, -1), patches_RND.reshape(B, G, *patches_RND.shape[1:])


def key_words(
  words: Sequence[str], texts: Sequence[str], most: int
) -> tuple[np.ndarray, np.ndarray]:
  """Key words of texts: rows of the table, and how often each counts, both int32 (B, K).

  K is `most`, the most tokens that a prompt may have, so that all batches of all processes have one
  shape; places behind a text's last key word count 0 times.

  Args:
    words: the key words of the data, sorted.
  """
  rows = {word: row for row, word in enumerate(words)}
  row_BK, count_BK = np.zeros((2, len(texts), most), np.int32)
  for b, text in enumerate(texts):
    found = collections.Counter(word for word in text.split() if word in rows)
    row_BK[b, : len(found)] = [rows[word] for word in found]
    count_BK[b, : len(found)] = list(found.values())
  return row_BK, count_BK


def statements(
  examples: Sequence[examples_lib.Example],
  answers_BG: Sequence[Sequence[str | None]],
  texts_BG: Sequence[Sequence[str]],
) -> list[str]:
  """Replies as statements about the image shown, one after the other.

  A reply that states no answer stays as it is.

  Raises:
    ValueError: an example makes no statements.
  """
  out = []
  for example, answers, texts in zip(examples, answers_BG, texts_BG):
    if example.statement is None:
      raise ValueError(
        f'example {example.index} of {tasks.UNDERSTAND!r} has no statement, which '
        f'config.align.rewards.{tasks.UNDERSTAND}.semantic needs; expected a '
        'function from an answer to a text'
      )
    # The dual encoder has no token for an unknown word.
    out.extend(
      example.statement(answer) if answer else text.replace(tokenizer_lib.UNKNOWN, '')
      for answer, text in zip(answers, texts)
    )
  return out
