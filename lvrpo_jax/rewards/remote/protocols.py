"""Writes the requests to a remote judge and reads its replies."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import io
import json
import math
import re
from typing import Any
from urllib import parse

import numpy as np
from PIL import Image

from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.rewards.remote import endpoint as endpoint_lib

GARBAGE, ERROR, MISSING, RANGE = 'garbage', 'error', 'missing', 'range'
"""Causes: an unreadable reply or value; an error that the judge reports; no score for a sample; a
number that is not finite or not in [low, high]."""

ANSWERED = (GARBAGE, ERROR, MISSING, RANGE)
"""Causes of samples that the server has replied about."""

UNASKED = 'unasked'
"""Cause of a sample that was not sent: its template names a question, and its prompt has none."""

Verdict = float | str
"""A value, or the cause why there is none."""

Outputs = np.ndarray | types.Array | Sequence[Sequence[str]]
"""uint8 images (B, G, Y, X, 3), or B lists of G answers."""

ASKED = ('question', 'expected')
"""Fields of the question about the image that an iteration asks: the question, and the answer that
an image of the prompt should get. The question of 'understand' is its prompt."""
FIELDS = ('prompt', 'answer', 'reference', 'kind', *ASKED)
"""Names that `{...}` in a template may hold: the prompt, the sampled answer, the right answer, the
kind, and `ASKED`."""

_SHOWN = (
  'How well does the image show this: {prompt}\n'
  'Reply with one number from 0 (not at all) to 1 (fully) and nothing else.'
)
TEMPLATES = {
  tasks.GENERATE: _SHOWN,
  tasks.THINK_GENERATE: _SHOWN,
  tasks.EDIT: 'The second image was made from the first one by this instruction: {prompt}\n'
  'Reply with one number from 0 (not followed, or other things changed) to 1 '
  '(followed, nothing else changed) and nothing else.',
  tasks.UNDERSTAND: 'A question about the image: {prompt}\nAn answer: {answer}\n'
  'Is the answer right? Reply with yes or no and nothing else.',
}
"""Chat texts where the endpoint has none. The images follow them, the source before the result."""

_FIELD = re.compile(r'\{(\w+)\}')
# Exponents are read because servers print floats with str(), which gives '5e-05'.
_NUMBER = re.compile(r'[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?')


@dataclasses.dataclass(frozen=True)
class Sample:
  """An image or answer to score.

  Attributes:
    fields: prompt, answer, reference, kind, spec and questions, JSON-able; a batch sends them all.
    asked: `ASKED`, '' where the prompt has no question; for templates.
    image: uint8 (Y, X, 3), the generated image, or None.
    source: uint8 (Y, X, 3), the image that was given, or None.
  """

  fields: dict[str, Any]
  asked: dict[str, str]
  image: np.ndarray | None
  source: np.ndarray | None


def _is_number(value: object) -> bool:
  # The bound keeps the value finite as float32.
  return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 1e30


def _is_integer(value: object, least: int) -> bool:
  return isinstance(value, int) and value >= least


def _is_url(text: str) -> bool:
  """Whether a text is a full http or https address without a user."""
  try:
    url = parse.urlsplit(text)
    good = url.scheme in ('http', 'https') and bool(url.hostname) and '@' not in url.netloc
    return good and url.port != 0
  except ValueError:  # Of brackets or the port.
    return False


def check(endpoint: endpoint_lib.Endpoint, key: str) -> None:
  """Checks the settings of an endpoint.

  Args:
    endpoint: the settings.
    key: config key of the endpoint, for messages.

  Raises:
    ValueError: one is not allowed; the message names its config key.
  """
  if not _is_url(endpoint.url):
    # The message leaves out the address, which may hold a password.
    raise ValueError(
      f'{key}.url is not allowed; allowed: a full http or https address without a '
      f'user name or password ({key}.api_key_env is for keys)'
    )
  _check_templates(endpoint, key)
  values = vars(endpoint)
  checks: list[tuple[str, bool, str]] = [
    ('protocol', endpoint.protocol in ('batch', 'chat'), "'batch' or 'chat'"),
    ('model', endpoint.protocol == 'batch' or bool(endpoint.model), "the model's name"),
  ]
  for least, names in ((1, ('batch', 'concurrency')), (0, ('retries', 'garbage_limit'))):
    for name in names:
      checks.append((name, _is_integer(values[name], least), f'an integer of at least {least}'))
  for name in ('timeout_s', 'deadline_s'):
    checks.append((name, _is_number(values[name]) and values[name] > 0, 'a number above 0'))
  high = _is_number(endpoint.high) and endpoint.high > endpoint.low
  checks += [('low', _is_number(endpoint.low), 'a number'), ('high', high, 'a number above low')]
  for name, good, allowed in checks:
    if not good:
      raise ValueError(f'{key}.{name} is {values[name]!r}; allowed: {allowed}')


def _check_templates(endpoint: endpoint_lib.Endpoint, key: str) -> None:
  """Checks the fields and tasks that templates name; see `check`."""
  if unknown := sorted(endpoint.templates.keys() - set(tasks.TASKS)):
    raise ValueError(f'{key}.templates holds {unknown}; allowed: {tasks.TASKS}')
  texts = {
    'template': endpoint.template,
    **{f'templates.{task}': text for task, text in endpoint.templates.items()},
  }
  for name, text in texts.items():
    for field in _FIELD.findall(text):
      if field not in FIELDS:
        raise ValueError(
          f'{key}.{name} names the field {{{field}}}; allowed: '
          + ', '.join(f'{{{known}}}' for known in FIELDS)
        )


def dumps(value: types.Json) -> bytes:
  """Writes JSON, the same text for equal content; NumPy numbers and arrays become plain ones.

  Raises:
    TypeError, ValueError: the value has no JSON form.
  """

  def plain(leaf: object) -> types.Json:
    if isinstance(leaf, (np.ndarray, np.generic)):
      return leaf.tolist()
    raise TypeError(f'a spec must be JSON-able, but holds {leaf!r}')

  return json.dumps(value, default=plain, sort_keys=True, allow_nan=False).encode()


def address(endpoint: endpoint_lib.Endpoint) -> str:
  """Returns the url for messages, without its query, which may hold a key."""
  return endpoint.url.partition('?')[0]


def template(endpoint: endpoint_lib.Endpoint, task: str) -> str:
  """Returns the chat text of an endpoint for a task."""
  return endpoint.templates.get(task) or endpoint.template or TEMPLATES[task]


def _named(endpoint: endpoint_lib.Endpoint, task: str) -> list[str]:
  """Returns those of `ASKED` that a chat's template for a task names; a batch has no template."""
  chat = endpoint.protocol == 'chat'
  return [name for name in ASKED if chat and f'{{{name}}}' in template(endpoint, task)]


def complete(endpoint: endpoint_lib.Endpoint, task: str, sample: Sample) -> bool:
  """Whether a sample has the question that its template names."""
  return all(sample.asked[name] for name in _named(endpoint, task))


def samples_of(
  task: str, examples: Sequence[examples_lib.Example], outputs_BG: Outputs, iteration: int = 0
) -> tuple[list[Sample], tuple[int, int]]:
  """Returns samples in row order (b, g), and (B, G).

  Args:
    task: one of `tasks.TASKS`.
    examples: B prompts.
    outputs_BG: images or answers, see `client.Judge.submit`.
    iteration: selects the question of a prompt that is asked.

  Raises:
    ValueError: the task is unknown, or the outputs have another form.
  """
  if task not in tasks.TASKS:
    raise ValueError(f'task {task!r}; allowed: {tasks.TASKS}')
  outputs, shape = _answers(outputs_BG) if task == tasks.UNDERSTAND else _images(outputs_BG)
  if len(examples) != shape[0]:
    raise ValueError(f'{len(examples)} examples, but outputs of {shape[0]} prompts')
  out = []
  for example, row in zip(examples, outputs, strict=True):
    source = None if example.source is None else np.asarray(example.source)
    question, expected = (
      (example.prompt, example.answer or '')
      if task == tasks.UNDERSTAND
      else example.asked(iteration)
    )
    questions = [{'question': q, 'answer': a} for q, a in example.questions]
    for output in row:
      text, image = (output, None) if isinstance(output, str) else (None, output)
      fields = {
        'prompt': example.prompt,
        'answer': text,
        'reference': example.answer,
        'kind': example.kind,
        'spec': example.spec,
        'questions': questions,
      }
      asked = {'question': question, 'expected': expected}
      out.append(Sample(fields=fields, asked=asked, image=image, source=source))
  return out, shape


def _answers(outputs_BG: Outputs) -> tuple[list[list[str]], tuple[int, int]]:
  """Returns answers as lists, and (B, G)."""
  outputs = [list(row) for row in outputs_BG]
  groups = {len(row) for row in outputs}
  if len(groups) > 1 or not all(isinstance(text, str) for row in outputs for text in row):
    raise ValueError('answers are lists of str, as many for every prompt')
  return outputs, (len(outputs), groups.pop() if groups else 0)


def _images(outputs_BG: Outputs) -> tuple[np.ndarray, tuple[int, int]]:
  """Returns images as uint8 (B, G, Y, X, 3), and (B, G)."""
  outputs = np.array(outputs_BG)  # Copied, because a view would hold the device's buffer.
  if outputs.dtype != np.uint8 or outputs.ndim != 5 or outputs.shape[-1] != 3:
    raise ValueError(f'images are uint8 (B, G, Y, X, 3), not {outputs.dtype} {outputs.shape}')
  return outputs, outputs.shape[:2]


def keys_of(endpoint: endpoint_lib.Endpoint, task: str, samples: Sequence[Sample]) -> Iterator[str]:
  """Yields a digest of all that a sample's value may depend on: judge, question and pixels."""
  settings = [
    endpoint.protocol,
    endpoint.url,
    endpoint.model,
    template(endpoint, task),
    dict(endpoint.body),
    task,
  ]
  if endpoint.protocol == 'chat':  # The cache keeps a 'yes' as its number.
    settings += [float(endpoint.low), float(endpoint.high)]
  for sample in samples:
    images = (sample.image, sample.source)
    shapes = [None if image is None else image.shape for image in images]
    asked = [sample.asked[name] for name in _named(endpoint, task)]
    digest = hashlib.sha256(dumps([settings, sample.fields, asked, shapes]))
    for image in images:
      if image is not None:
        digest.update(np.ascontiguousarray(image).data)
    yield digest.hexdigest()


def encode(endpoint: endpoint_lib.Endpoint, task: str, samples: Sequence[Sample]) -> bytes:
  """Returns the body of a request for samples; a chat takes one."""
  if endpoint.protocol == 'batch':
    entries = [
      {
        'id': str(index),
        **sample.fields,
        'image': _png(sample.image),
        'source': _png(sample.source),
      }
      for index, sample in enumerate(samples)
    ]
    return dumps({'task': task, 'samples': entries})
  (sample,) = samples
  known = {**sample.fields, **sample.asked}

  def fill(found: re.Match[str]) -> str:
    return str(known[found[1]] or '')

  # One pass over the template leaves braces within a prompt as they are.
  content = [{'type': 'text', 'text': _FIELD.sub(fill, template(endpoint, task))}]
  content += [
    {'type': 'image_url', 'image_url': {'url': f'data:image/png;base64,{_png(image)}'}}
    for image in (sample.source, sample.image)
    if image is not None
  ]
  body = {
    'model': endpoint.model,
    'messages': [{'role': 'user', 'content': content}],
    'temperature': 0,
    **endpoint.body,
  }
  return dumps({name: value for name, value in body.items() if value is not None})


def read(endpoint: endpoint_lib.Endpoint, reply: bytes, count: int) -> list[Verdict]:
  """Returns the verdicts of the `count` samples of a request, in their order."""
  try:
    parsed = json.loads(reply)
  except (ValueError, RecursionError):
    return [GARBAGE] * count
  if endpoint.protocol == 'batch':
    return _read_scores(endpoint, parsed, count)
  try:
    content = parsed['choices'][0]['message']['content']
  except (LookupError, TypeError):
    return [GARBAGE]
  return [_read_words(endpoint, content) if isinstance(content, str) else GARBAGE]


def _read_scores(endpoint: endpoint_lib.Endpoint, parsed: types.Json, count: int) -> list[Verdict]:
  """Reads a batch reply; scores of unknown ids are skipped, two for one id are garbage."""
  scores = parsed.get('scores') if isinstance(parsed, dict) else None
  if not isinstance(scores, list):
    return [GARBAGE] * count
  found: dict[str, list[dict[str, Any]]] = {}
  for score in scores:
    name = score.get('id') if isinstance(score, dict) else None
    if isinstance(name, str):
      found.setdefault(name, []).append(score)
  verdicts: list[Verdict] = []
  for index in range(count):
    entries = found.get(str(index), [])
    if not entries:
      verdicts.append(MISSING)
    elif len(entries) > 1 or ('value' in entries[0]) == ('error' in entries[0]):
      verdicts.append(GARBAGE)
    elif 'error' in entries[0]:
      verdicts.append(ERROR)
    else:
      verdicts.append(_within(endpoint, entries[0]['value']))
  return verdicts


def _read_words(endpoint: endpoint_lib.Endpoint, text: str) -> Verdict:
  """Reads a chat reply: a number, yes or no, and no other word.

  'about 0.7' and '7/10' are garbage.
  """
  text = text.strip()
  if _NUMBER.fullmatch(text):
    return _within(endpoint, float(text))
  words: dict[str, Verdict] = {'yes': float(endpoint.high), 'no': float(endpoint.low)}
  return words.get(text.lower().removesuffix('.'), GARBAGE)


def _within(endpoint: endpoint_lib.Endpoint, value: types.Json) -> Verdict:
  """Returns a JSON value as a float; true and false, numbers to Python, are garbage."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return GARBAGE
  return float(value) if endpoint.low <= value <= endpoint.high else RANGE


def _png(image_YXC: np.ndarray | None) -> str | None:
  """Returns base64 of a PNG file; weak compression is several times faster."""
  if image_YXC is None:
    return None
  buffer = io.BytesIO()
  Image.fromarray(image_YXC).save(buffer, format='PNG', compress_level=1)
  return base64.b64encode(buffer.getvalue()).decode()
