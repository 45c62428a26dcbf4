"""What frozen models say about samples: the reward components that are computed on devices.

An argument that is None leaves its component out, and with it every pass that nothing else needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models.bagel import policy
from lvrpo_jax.rewards import knowledge
from lvrpo_jax.rewards import mutual
from lvrpo_jax.rewards import reference_qa
from lvrpo_jax.rewards import semantic
from lvrpo_jax.runtime import experiment as experiment_lib

Array = jax.Array


class FrozenParams(NamedTuple):
  """Frozen parameters that score.

  Attributes:
    reference: the pretrained policy, whose understanding branch answers questions.
    siglip: the dual encoder.
    words_WD: the key words of the data in its joint space, see `experiment.word_table`.
  """

  reference: types.Params
  siglip: types.Params
  words_WD: Array


def images(
  job: experiment_lib.Experiment,
  answer_ids_A: Array,
  judges: FrozenParams,
  vae_params: types.Params,
  pixels_BGYXC: Array,
  captions_BL: Array | None,
  words: tuple[Array, Array] | None,
  inquiry: reference_qa.ReferenceQuestions | None,
) -> dict[str, Array]:
  """Values (B, G) of images by component.

  Args:
    answer_ids_A: first tokens of all answers.
    captions_BL: the prompts for the judge's text tower; for 'semantic'.
    words: rows of key words and how often each counts, both (B, K); for 'dense'.
    inquiry: what the reference is asked; for 'knowledge', and with blind questions for 'mutual'.
  """
  B, G = pixels_BGYXC.shape[:2]
  flat = pixels_BGYXC.reshape(B * G, *pixels_BGYXC.shape[2:])
  group = lambda x: x.reshape(B, G, *x.shape[1:])
  out = {}
  if captions_BL is not None or words is not None:
    image, patches = _siglip(job, judges, 'embed_image', policy.to_unit(flat))
  if captions_BL is not None:
    text, _ = _siglip(job, judges, 'embed_text', captions_BL)
    out['semantic'] = semantic.similarity(group(image), text[:, None])
  if words is not None:
    out['dense'] = semantic.dense(
      group(patches), judges.words_WD, *words, top=job.config.align.dense_top
    )
  if inquiry is not None:
    probability, gain = _ask(job, answer_ids_A, judges, vae_params, pixels_BGYXC, inquiry)
    out['knowledge'] = knowledge.agreement(
      jnp.moveaxis(probability, 0, 2), inquiry.answer_BQ, inquiry.asked_BQ
    )
    if gain is not None:
      out['mutual'] = mutual.total(gain, inquiry.asked_BQ, inquiry.number_B)
  return out


def answers(
  job: experiment_lib.Experiment,
  answer_ids_A: Array,
  judges: FrozenParams,
  vae_params: types.Params,
  prompts: types.Prompts,
  statements_RL: Array | None,
  answer_BG: Array | None,
  blind: types.Prompts | None,
) -> dict[str, Array]:
  """Values (B, G) of answers by component.

  Args:
    answer_ids_A: first tokens of all answers.
    prompts: the questions with their images.
    statements_RL: the answers put as statements, for the judge's text tower; for 'semantic'. (The
      question is the same for a whole group: its similarity to the image teaches nothing.)
    answer_BG: numbers of the answers, negative where there is none; for 'knowledge' and 'mutual'.
    blind: the questions without their images; for 'mutual'.
  """
  out = {}
  if statements_RL is not None:
    image, _ = _siglip(job, judges, 'embed_image', policy.to_unit(prompts.source_BYXC))
    text, _ = _siglip(job, judges, 'embed_text', statements_RL)
    out['semantic'] = semantic.similarity(
      image[:, None], text.reshape(len(image), -1, text.shape[-1])
    )
  if answer_BG is not None:
    seen = first_token(job, judges, vae_params, prompts)
    probability = knowledge.answer_probabilities(seen, answer_ids_A)
    agreed = jnp.take_along_axis(probability, jnp.maximum(answer_BG, 0), axis=-1)
    out['knowledge'] = jnp.where(answer_BG >= 0, agreed, 0.0)
    if blind is not None:
      without = first_token(job, judges, vae_params, blind)
      pick = lambda logits: jnp.broadcast_to(
        logits[:, None, answer_ids_A], (*answer_BG.shape, len(answer_ids_A))
      )
      out['mutual'] = mutual.gain(pick(seen), pick(without), answer_BG)
  return out


def _ask(
  job: experiment_lib.Experiment,
  answer_ids_A: Array,
  judges: FrozenParams,
  vae_params: types.Params,
  pixels_BGYXC: Array,
  inquiry: reference_qa.ReferenceQuestions,
) -> tuple[Array, Array | None]:
  """Probabilities (Q, B, G, A) of answers, and gains (Q, B, G) where there are blind questions."""
  B, G = pixels_BGYXC.shape[:2]
  flat = pixels_BGYXC.reshape(B * G, *pixels_BGYXC.shape[2:])

  def one(asked):
    questions, blind, answer_B = asked
    spread = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), questions)
    seen = first_token(job, judges, vae_params, spread.replace(source_BYXC=flat))
    probability = knowledge.answer_probabilities(seen, answer_ids_A).reshape(B, G, -1)
    if blind is None:
      return probability, None
    blank = jnp.zeros((B, *flat.shape[1:]), flat.dtype)
    without = first_token(job, judges, vae_params, blind.replace(source_BYXC=blank))
    without = without[:, None, answer_ids_A]
    return probability, mutual.gain(
      seen[:, answer_ids_A].reshape(B, G, -1), without, jnp.broadcast_to(answer_B[:, None], (B, G))
    )

  stack = lambda trees: trees and jax.tree.map(lambda *x: jnp.stack(x), *trees)
  asked = stack(inquiry.questions), stack(inquiry.blind), inquiry.answer_BQ.T
  if len(inquiry.questions) > 1:  # One after the other: they take the memory of one.
    return jax.lax.map(one, asked)
  return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], asked)))


def first_token(
  job: experiment_lib.Experiment,
  judges: FrozenParams,
  vae_params: types.Params,
  prompts: types.Prompts,
) -> Array:
  """The reference's logits (B, V) of the first token of an answer."""
  cache = job.policy.prefill(judges.reference, vae_params, prompts)
  start = jnp.full((prompts.ids_BL.shape[0], 1, 1), job.policy.bos)
  return job.policy.read(judges.reference, cache, start)[:, 0, 0]


def _siglip(job: experiment_lib.Experiment, judges: FrozenParams, method: str, x: Array) -> Any:
  return job.judge.apply({'params': judges.siglip}, x, method=method)
