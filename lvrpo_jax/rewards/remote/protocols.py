"""What is sent to a remote judge, and how its replies are read."""

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

from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks

GARBAGE, ERROR, MISSING, RANGE = 'garbage', 'error', 'missing', 'range'
"""Causes: an unreadable reply or value; the judge's own error; no score for a sample; a number that
is not finite or not in [low, high]."""

ANSWERED = (GARBAGE, ERROR, MISSING, RANGE)
"""Causes of samples that the server has replied about."""

UNASKED = 'unasked'
"""Cause of a sample that was not sent, as its template names a question and its prompt has none."""

Verdict = float | str
"""A value, or the cause why there is none."""

ASKED = ('question', 'expected')
FIELDS = ('prompt', 'answer', 'reference', 'kind', *ASKED)
"""What `{...}` in a template may name: prompt, the answer given, the right answer, the kind; and
the question about the image that an iteration asks, with the answer that an image of the prompt
should get. 'understand' asks its prompt."""

_DRAWN = (
  'How well does the image show this: {prompt}\n'
  'Reply with one number from 0 (not at all) to 1 (fully) and nothing else.'
)
TEMPLATES = {
  tasks.GENERATE: _DRAWN,
  tasks.THINK_GENERATE: _DRAWN,
  tasks.EDIT: 'The second image was made from the first one by this instruction: {prompt}\n'
  'Reply with one number from 0 (not followed, or other things changed) to 1 '
  '(followed, nothing else changed) and nothing else.',
  tasks.UNDERSTAND: 'A question about the image: {prompt}\nAn answer: {answer}\n'
  'Is the answer right? Reply with yes or no and nothing else.',
}
"""Chat texts where the endpoint has none. The images follow: the source first, then the result."""

_FIELD = re.compile(r'\{(\w+)\}')
# Servers print floats with str(), which gives '5e-05'.
_NUMBER = re.compile(r'[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?')


@dataclasses.dataclass(frozen=True)
class Sample:
  """One thing to score.

  Attributes:
    fields: prompt, answer, reference, kind, spec and questions, JSON-able; all that a batch sends.
    asked: `ASKED`, '' where the prompt has no question; for templates.
    image: uint8 (Y, X, 3), what was drawn, or None.
    source: uint8 (Y, X, 3), what was shown, or None.
  """

  fields: dict[str, Any]
  asked: dict[str, str]
  image: np.ndarray | None
  source: np.ndarray | None


def check(endpoint: Any, key: str) -> None:
  """Looks at the settings of a `client.Endpoint`.

  Raises:
    ValueError: one is not allowed; the message names its config key.
  """
  e = endpoint
  try:
    url = parse.urlsplit(e.url)
    good_url = url.scheme in ('http', 'https') and bool(url.hostname) and '@' not in url.netloc
    good_url &= url.port != 0
  except ValueError:  # brackets or port
    good_url = False
  # Without the address itself: it may hold a password.
  if not good_url:
    raise ValueError(
      f'{key}.url is not allowed; allowed: a full http or https address without a '
      f'user name or password ({key}.api_key_env is for keys)'
    )
  number = lambda v: isinstance(v, (int, float)) and math.isfinite(v) and abs(v) < 1e30  # float32
  whole = lambda v: isinstance(v, int) and v >= 1
  _check_templates(e, key)
  for name, good, allowed in (
    ('protocol', e.protocol in ('batch', 'chat'), "'batch' or 'chat'"),
    ('model', e.protocol == 'batch' or e.model, "the model's name"),
    ('batch', whole(e.batch), 'an integer of at least 1'),
    ('concurrency', whole(e.concurrency), 'an integer of at least 1'),
    ('retries', isinstance(e.retries, int) and e.retries >= 0, 'an integer of at least 0'),
    (
      'garbage_limit',
      isinstance(e.garbage_limit, int) and e.garbage_limit >= 0,
      'an integer of at least 0',
    ),
    ('timeout_s', number(e.timeout_s) and e.timeout_s > 0, 'a number above 0'),
    ('deadline_s', number(e.deadline_s) and e.deadline_s > 0, 'a number above 0'),
    ('low', number(e.low), 'a number'),
    ('high', number(e.high) and e.high > e.low, 'a number above low'),
  ):
    if not good:
      raise ValueError(f'{key}.{name} is {vars(e)[name]!r}; allowed: {allowed}')


def _check_templates(endpoint: Any, key: str) -> None:
  """Looks for fields and tasks that there are not; see `check`."""
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


def dumps(value: Any) -> bytes:
  """JSON in one form for one content; NumPy numbers and arrays become plain ones.

  Raises:
    TypeError, ValueError: the value has no JSON form.
  """

  def plain(x):
    if isinstance(x, (np.ndarray, np.generic)):
      return x.tolist()
    raise TypeError(f'a spec must be JSON-able, but holds {x!r}')

  return json.dumps(value, default=plain, sort_keys=True, allow_nan=False).encode()


def address(endpoint: Any) -> str:
  """The url for messages: a query may hold a key."""
  return endpoint.url.partition('?')[0]


def template(endpoint: Any, task: str) -> str:
  """The chat text of an endpoint for a task."""
  return endpoint.templates.get(task) or endpoint.template or TEMPLATES[task]


def _named(endpoint: Any, task: str) -> list[str]:
  """What a chat's template for a task names of `ASKED`; a batch has no template."""
  chat = endpoint.protocol == 'chat'
  return [name for name in ASKED if chat and f'{{{name}}}' in template(endpoint, task)]


def complete(endpoint: Any, task: str, sample: Sample) -> bool:
  """Whether a sample has the question that its template names."""
  return all(sample.asked[name] for name in _named(endpoint, task))


def samples_of(
  task: str, examples: Sequence[examples_lib.Example], outputs_BG: Any, iteration: int = 0
) -> tuple[list[Sample], tuple[int, int]]:
  """Samples in row order (b, g), and (B, G); each asks the question of an iteration.

  Raises:
    ValueError: the outputs have another form than `client.Judge.submit` takes.
  """
  if task not in tasks.TASKS:
    raise ValueError(f'task {task!r}; allowed: {tasks.TASKS}')
  if task == tasks.UNDERSTAND:
    outputs = [list(row) for row in outputs_BG]
    groups = {len(row) for row in outputs}
    if len(groups) > 1 or not all(isinstance(text, str) for row in outputs for text in row):
      raise ValueError('answers are lists of str, as many for every prompt')
    shape = (len(outputs), groups.pop() if groups else 0)
  else:
    outputs = np.array(outputs_BG)  # A copy: a view would hold the device's buffer.
    if outputs.dtype != np.uint8 or outputs.ndim != 5 or outputs.shape[-1] != 3:
      raise ValueError(f'images are uint8 (B, G, Y, X, 3), not {outputs.dtype} {outputs.shape}')
    shape = outputs.shape[:2]
  if len(examples) != shape[0]:
    raise ValueError(f'{len(examples)} examples, but outputs of {shape[0]} prompts')
  out = []
  for example, row in zip(examples, outputs):
    source = None if example.source is None else np.asarray(example.source)
    question, expected = (
      (example.prompt, example.answer or '')
      if task == tasks.UNDERSTAND
      else example.asked(iteration)
    )
    questions = [{'question': q, 'answer': a} for q, a in example.questions]
    for output in row:
      text, image = (output, None) if isinstance(output, str) else (None, output)
      out.append(
        Sample(
          dict(
            prompt=example.prompt,
            answer=text,
            reference=example.answer,
            kind=example.kind,
            spec=example.spec,
            questions=questions,
          ),
          dict(question=question, expected=expected),
          image,
          source,
        )
      )
  return out, shape


def keys_of(endpoint: Any, task: str, samples: Sequence[Sample]) -> Iterator[str]:
  """Digest of all that a sample's value may depend on: the judge, the question, the pixels."""
  settings = [
    endpoint.protocol,
    endpoint.url,
    endpoint.model,
    template(endpoint, task),
    dict(endpoint.body),
    task,
  ]
  if endpoint.protocol == 'chat':  # A 'yes' is kept as the number that it stands for.
    settings += [float(endpoint.low), float(endpoint.high)]
  for sample in samples:
    pictures = (sample.image, sample.source)
    shapes = [None if p is None else p.shape for p in pictures]
    asked = [sample.asked[name] for name in _named(endpoint, task)]
    digest = hashlib.sha256(dumps([settings, sample.fields, asked, shapes]))
    for picture in pictures:
      if picture is not None:
        digest.update(np.ascontiguousarray(picture))
    yield digest.hexdigest()


def encode(endpoint: Any, task: str, samples: Sequence[Sample]) -> bytes:
  """Body of a request for samples; a chat takes one."""
  if endpoint.protocol == 'batch':
    return dumps(
      {
        'task': task,
        'samples': [
          {'id': str(i), **s.fields, 'image': _png(s.image), 'source': _png(s.source)}
          for i, s in enumerate(samples)
        ],
      }
    )
  (sample,) = samples
  known = {**sample.fields, **sample.asked}
  fill = lambda found: str(known[found[1]] or '')
  # One pass over the template, so that braces within a prompt stay what they are.
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


def read(endpoint: Any, reply: bytes, count: int) -> list[Verdict]:
  """Verdicts of the `count` samples of a request, in their order."""
  try:
    parsed = json.loads(reply)
  except (ValueError, RecursionError):
    return [GARBAGE] * count
  if endpoint.protocol == 'batch':
    return _read_scores(endpoint, parsed, count)
  try:
    said = parsed['choices'][0]['message']['content']
  except (LookupError, TypeError):
    return [GARBAGE]
  return [_read_words(endpoint, said) if isinstance(said, str) else GARBAGE]


def _read_scores(endpoint: Any, parsed: Any, count: int) -> list[Verdict]:
  """Of a batch reply. Scores of unknown ids are passed over; two for one id are none."""
  scores = parsed.get('scores') if isinstance(parsed, dict) else None
  if not isinstance(scores, list):
    return [GARBAGE] * count
  found = {}
  for score in scores:
    name = score.get('id') if isinstance(score, dict) else None
    if isinstance(name, str):
      found.setdefault(name, []).append(score)
  verdicts = []
  for i in range(count):
    entries = found.get(str(i), [])
    if not entries:
      verdicts.append(MISSING)
    elif len(entries) > 1 or ('value' in entries[0]) == ('error' in entries[0]):
      verdicts.append(GARBAGE)
    elif 'error' in entries[0]:
      verdicts.append(ERROR)
    else:
      verdicts.append(_within(endpoint, entries[0]['value']))
  return verdicts


def _read_words(endpoint: Any, said: str) -> Verdict:
  """Of a chat: a number or yes or no, and no other word; 'about 0.7' or '7/10' are garbage."""
  said = said.strip()
  if _NUMBER.fullmatch(said):
    return _within(endpoint, float(said))
  words = {'yes': float(endpoint.high), 'no': float(endpoint.low)}
  return words.get(said.lower().removesuffix('.'), GARBAGE)


def _within(endpoint: Any, value: Any) -> Verdict:
  """A JSON value as a float; true and false, which Python takes for numbers, are garbage."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return GARBAGE
  return float(value) if endpoint.low <= value <= endpoint.high else RANGE


def _png(image_YXC: np.ndarray | None) -> str | None:
  """Base64 of a PNG file; weakly compressed, which is several times faster."""
  if image_YXC is None:
    return None
  buffer = io.BytesIO()
  Image.fromarray(image_YXC).save(buffer, format='PNG', compress_level=1)
  return base64.b64encode(buffer.getvalue()).decode()
