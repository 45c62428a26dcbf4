"""Semantic rewards: similarity of images and texts in the joint space of a dual encoder.

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
"""Number of key words in one pass of the text tower."""


def similarity(image_BGD: Array, text_BGD: Array) -> Array:
  """Computes cosines (B, G) of unit vectors; a text (B, 1, D) counts for a whole group."""
  return jnp.sum(image_BGD * text_BGD, axis=-1)


def dense(
  patch_BGND: Array, words_WD: Array, row_BK: Array, count_BK: Array, top: int = 1
) -> Array:
  """Averages, over the key words of a prompt, their match among the image's patches, (B, G).

  With `top = 1` the match of a word is its cosine with the best patch, LVRPO's form (arXiv
  2603.27693). With `top = k` it is the mean over the k best patches. One patch alone cannot give a
  high mean then: its cosine is at most 1 and has the weight 1/k, so k patches have to match. Only
  the words of a prompt are compared with its patches, so the largest array has shape (B, G, K, N).

  Args:
    patch_BGND: unit vectors of patches, at least `top` of them.
    words_WD: unit vectors of all key words.
    row_BK: rows of `words_WD` of the key words of a prompt.
    count_BK: weight of each of them; 0 for padding.
    top: number of best patches.
  """
  match_BGKN = jnp.einsum('BGND,BKD->BGKN', patch_BGND, words_WD[row_BK])
  best_BGK = jnp.mean(jax.lax.top_k(match_BGKN, top)[0], axis=-1)
  weight_B1K = count_BK[:, None].astype(jnp.float32)
  return jnp.sum(best_BGK * weight_B1K, axis=-1) / jnp.maximum(jnp.sum(weight_B1K, axis=-1), 1.0)


class Semantic:
  """Scores an image by its caption, and an answer by its statement about the image shown.

  The question of an answer is not compared with the image: it is the same for a whole group, so its
  similarity gives no advantage.
  """

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = base.DEVICE

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    """Keeps the data source and the dual encoder."""
    self._task, self._data, self._encoder = task, experiment.data, experiment.dual_encoder
    self._key = base.key_of(task, settings, experiment)

  def load(self, frozen: base.RewardParams) -> types.Params:
    """Returns (): the dual encoder is shared."""
    del frozen
    return ()

  def prepare(self, samples: base.Samples) -> base.Prepared:
    """Encodes captions to token ids (B, L), or statements to (B, G, L)."""
    if not samples.are_texts:
      return base.Prepared(self._encoder.token_ids([x.prompt for x in samples.examples])[0])
    texts_BG = samples.texts_BG
    answers_BG = [[self._data.read_answer(text) for text in row] for row in texts_BG]
    said = statements(samples.examples, answers_BG, texts_BG, self._key)
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
    """Returns cosines (B, G)."""
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
  """Scores an image by the match of its patches with the key words of its caption, see `dense`."""

  outputs = frozenset((tasks.IMAGE,))
  runs_on = base.DEVICE

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    """Sorts the key words of the data.

    Raises:
      ValueError: `top` is not between 1 and the number of patches of an image.
    """
    self._encoder, self._top = experiment.dual_encoder, settings.top
    self._words = sorted(experiment.data.key_words)
    self._most = experiment.config.data.prompt_tokens
    patches = self._encoder.module.vision_config.side**2
    if not 1 <= self._top <= patches:
      key = base.key_of(task, settings, experiment)
      raise ValueError(
        f'{key}.top is {self._top}; allowed: 1 to the {patches} patches that the dual encoder cuts '
        'an image into'
      )

  def load(self, frozen: base.RewardParams) -> types.Params:
    """Returns unit vectors (W, D) of the data's key words, sorted, in the joint space."""
    ids_WL, _ = self._encoder.token_ids(self._words)

    def embed(ids_L: Array) -> Array:
      return self._encoder.embed_text(frozen.dual_encoder, ids_L[None])[0][0]

    # The words are embedded in parts, as a data source may have all nouns of a language.
    return jax.lax.map(embed, jnp.asarray(ids_WL), batch_size=WORDS_AT_ONCE)

  def prepare(self, samples: base.Samples) -> base.Prepared:
    """Finds the rows of the key words of every caption, and how often each counts."""
    return base.Prepared(key_words(self._words, [x.prompt for x in samples.examples], self._most))

  def __call__(
    self,
    params: types.Params,
    frozen: base.RewardParams,
    samples: base.DeviceSamples,
    inputs: types.Tree,
  ) -> Array:
    """Returns matches (B, G)."""
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
  """Finds the key words of texts: rows of the table, and how often each counts, both int32 (B, K).

  K is `most`, so that all batches of all processes have one shape. Places after the last key word
  of a text count 0 times.

  Args:
    words: the key words of the data, sorted.
    texts: B texts.
    most: largest number of tokens of a prompt.
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
  key: str,
) -> list[str]:
  """Rewrites replies as statements about the image shown, in one flat list.

  A reply that states no answer is kept, without unknown words.

  Args:
    examples: the B prompts.
    answers_BG: answers that the replies state.
    texts_BG: the replies.
    key: config key of the reward, for the message.

  Raises:
    ValueError: an example has no function that makes statements.
  """
  out = []
  for example, answers, texts in zip(examples, answers_BG, texts_BG):
    if example.statement is None:
      raise ValueError(
        f'example {example.index} of {tasks.UNDERSTAND!r} has no statement, which '
        f'{key} needs; expected a function from an answer to a text'
      )
    # The dual encoder has no token for an unknown word.
    out.extend(
      example.statement(answer) if answer else text.replace(tokenizer_lib.UNKNOWN, '')
      for answer, text in zip(answers, texts)
    )
  return out
