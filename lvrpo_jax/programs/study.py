"""The study: many runs from shared pretraining, and what each change to the method is worth.

    python -m lvrpo_jax.main --config=configs/study.py [--config.study.name=quick]

Every variant of `config.study.variants` is the config with some values changed, run as a process of its
own in `<workdir>/<study>/seed<n>/<variant>`, `config.study.workers` at once. Pretraining and the
measurement after it are done once a seed and copied. A run that is complete is never repeated, one
that was interrupted goes on, and after every run `study.md` and `study.html` are written anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import logging
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np

from configs import from_json
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import stats
from lvrpo_jax.models.bagel import policy
from lvrpo_jax.reports import study_tables
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import preemption
from lvrpo_jax.runtime import validate
from lvrpo_jax.runtime import weights
from lvrpo_jax.runtime import workdir as workdir_lib
from lvrpo_jax.training import fit
from lvrpo_jax.training import pretrain

PRETRAINED = 'pretrained'
"""Folder, beside those of the variants, of what they share."""
SHARED = ('checkpoints/vae', 'checkpoints/judge', 'checkpoints/pretrain', 'eval/before')
"""What a run of a variant takes over from it."""
ROWS = 60
"""Images that the critic reads at once."""
POLL = 1.0
"""Seconds between two looks at the runs under way."""


class Run(NamedTuple):
  """A run of the study; `number` is its place among those of its seed, `moment` the folder of
  `eval` that holds its measurement."""

  seed: int
  variant: str
  number: int
  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  moment: str


def changed(config: ml_collections.ConfigDict, *changes: Any) -> ml_collections.ConfigDict:
  """A copy of a config with some values changed.

  Raises:
    ValueError: a change names a key that there is not, or gives a value of another type.
  """
  out = config.copy_and_resolve_references()
  out.lock()
  for change in changes:
    try:
      out.update(change.to_dict() if isinstance(change, ml_collections.ConfigDict) else change)
    except (KeyError, TypeError) as error:
      raise ValueError(f'a change of the study is {change}, which does not fit: {error}') from error
  return out


def plan(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Run]:
  """All runs in order: a seed at a time, its pretraining first.

  Raises:
    ValueError: no such study or variant, or a variant that is no valid config.
  """
  if config.study not in config.study.plans:
    raise ValueError(f'config.study is {config.study!r}; allowed: {sorted(config.study.plans)}')
  study = config.study.plans[config.study]
  for name in study.variants:
    if name not in config.study.variants:
      raise ValueError(
        f'config.study.plans.{config.study}.variants holds {name!r}; allowed: {sorted(config.study.variants)}'
      )
  base = changed(config, study.changes, {'program': 'run'})
  base.unlock()
  base.variants, base.studies, base.workers = {}, {}, 1
  out = []
  for seed in study.seeds:
    names = {PRETRAINED: {'program': 'pretrain'}, **{n: config.study.variants[n] for n in study.variants}}
    for number, (name, change) in enumerate(names.items()):
      # What makes a study smaller holds, whatever steps a variant wants.
      mine = changed(base, change, study.changes, {'seed': seed})
      try:
        validate.validate(mine)
      except ValueError as error:
        raise ValueError(f'variant {name!r} of the study: {error}') from error
      out.append(
        Run(
          seed,
          name,
          number,
          mine,
          workdir / config.study / f'seed{seed}' / name,
          'before' if name == PRETRAINED else 'after',
        )
      )
  return out


def complete(run: Run) -> bool:
  """Whether a run has been measured to its end."""
  path = run.workdir / 'scores.json'
  return path.is_file() and run.moment in json.loads(path.read_text())


def prepare(run: Run, pretrained: Run) -> None:
  """Makes the workdir of a variant from the pretraining of its seed, in one piece."""
  if run.workdir.exists() or run.variant == PRETRAINED:
    return
  half = run.workdir.with_suffix('.half')
  shutil.rmtree(half, ignore_errors=True)
  for name in SHARED:
    shutil.copytree(pretrained.workdir / name, half / name)
  half.rename(run.workdir)


class Worker:
  """Runs one variant after the other, each in a process of its own that is bound to some cores."""

  def __init__(self, cores: set[int], cache: pathlib.Path):
    self._cores, self._cache = cores, cache
    self._process: subprocess.Popen[bytes] | None = None
    self.run: Run | None = None

  def start(self, run: Run) -> None:
    """Starts a run; its output goes to `log` in its workdir."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    wanted = run.workdir / 'wanted.json'
    workdir_lib.write_json(wanted, json.loads(run.config.to_json()))
    command = [
      sys.executable,
      '-m',
      'lvrpo_jax.main',
      f'--config={from_json.__file__}:{wanted}',
      f'--workdir={run.workdir}',
    ]
    environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(self._cache.resolve())}
    self.run = run
    with (run.workdir / 'log').open('a') as log, bound(self._cores):
      self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

  def finished(self) -> Run | None:
    """The run that has ended since the last call.

    Raises:
      RuntimeError: it failed.
    """
    if self._process is None or self._process.poll() is None:
      return None
    run, code = self.run, self._process.returncode
    self.run = self._process = None
    if code:
      last = (run.workdir / 'log').read_text().strip().split('\n')[-8:]
      raise RuntimeError(
        f'the run in {run.workdir} ended with status {code}; its log ends with\n  '
        + '\n  '.join(last)
      )
    return run

  def terminate(self) -> None:
    """Asks the run to save and end."""
    if self._process is not None:
      self._process.terminate()

  def wait(self) -> None:
    """Waits for the end of the run."""
    if self._process is not None:
      self._process.wait()


@contextlib.contextmanager
def bound(cores: set[int]) -> Iterator[None]:
  """Processes started inside keep to these cores; {} leaves them alone."""
  if not cores:
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def shares(workers: int) -> list[set[int]]:
  """Cores of every worker; {} where there is one alone, or where cores cannot be chosen.

  Raises:
    ValueError: there are fewer cores than workers.
  """
  if workers == 1 or sys.platform != 'linux':
    return [set()] * workers
  cores = sorted(os.sched_getaffinity(0))
  if not 1 <= workers <= len(cores):
    raise ValueError(f'config.study.workers is {workers}; allowed: 1 to {len(cores)}, the cores at hand')
  return [set(cores[i::workers]) for i in range(workers)]


def execute(runs: Sequence[Run], workers: Sequence[Worker]) -> Iterator[Run]:
  """Does the runs, as many at once as there are workers; yields each when it is complete.

  Raises:
    checkpoint.Preempted: this process was asked to stop; the runs have saved.
    RuntimeError: a run failed.
  """
  pretrained = {r.seed: r for r in runs if r.variant == PRETRAINED}
  waiting = [r for r in runs if not complete(r)]
  total, start = len(waiting), time.monotonic()
  with preemption.StopSignal() as stop:
    try:
      while waiting or any(w.run for w in workers):
        for worker in workers:
          one = worker.finished()
          if one is not None:
            yield one
          if worker.run is not None:
            continue
          ready = [r for r in waiting if r.variant == PRETRAINED or complete(pretrained[r.seed])]
          if ready:
            waiting.remove(ready[0])
            prepare(ready[0], pretrained[ready[0].seed])
            worker.start(ready[0])
            _announce(ready[0], total, len(waiting), time.monotonic() - start, len(workers))
        if stop.asked():
          raise preemption.Preempted('study stopped; its runs have ended')
        time.sleep(POLL)
    finally:
      for worker in workers:
        worker.terminate()
      for worker in workers:
        worker.wait()


def _announce(run: Run, total: int, waiting: int, spent: float, workers: int) -> None:
  """A line for a run that begins: how far the study is."""
  number = total - waiting
  done = max(number - workers, 0)
  left = f', about {spent / done * (total - done) / 60:.0f} minutes left' if done else ''
  logging.info(
    'study: run %d of %d (%s, seed %d), %.0f minutes so far%s',
    number,
    total,
    run.variant,
    run.seed,
    spent / 60,
    left,
  )


class Critic:
  """A dual encoder that pays no reward: how much its texts tell of pictures, in nats.

  It has a seed, a world and batches of its own; the scale of its logits is set on true pairs that
  no variant has seen (a critic may be chosen in any way that does not see what it is used on).
  """

  def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path):
    """Trains the critic, or reads it back from the folder."""
    c = config.study.critic
    mine = changed(config, c.changes, {'seed': c.seed, 'program': 'run'})
    self._experiment = experiment_lib.build(mine, folder)
    writer = metrics_lib.MetricWriter(folder)
    self._params = weights.make_or_restore(
      folder,
      weights.JUDGE,
      weights.template(self._experiment, weights.JUDGE),
      lambda: fit.train_dual_encoder(self._experiment, writer),
    )
    writer.close()
    self._image = jax.jit(
      lambda p, x: self._experiment.judge.apply({'params': p}, policy.to_unit(x), method='embed_image')[0]
    )
    self._text = jax.jit(
      lambda p, ids: self._experiment.judge.apply({'params': p}, ids, method='embed_text')[0]
    )
    pairs = [
      self._experiment.data.pretraining(tasks.GENERATE, pretrain.CONTROL_OFFSET + i)
      for i in range(c.pairs)
    ]
    similarity = self._similarity(
      np.stack([e.target for e in pairs])[:, None], [e.prompt for e in pairs]
    )
    scales = np.geomspace(1.0, 200.0, 40)
    means = [stats.information_terms(scale * similarity).mean() for scale in scales]
    self._scale = float(scales[int(np.argmax(means))])

  def _embed(self, function: Any, rows: np.ndarray) -> np.ndarray:
    """Vectors of rows, a part of one size at a time."""
    out = []
    for start in range(0, len(rows), ROWS):
      part = rows[start : start + ROWS]
      filled = np.concatenate([part, np.repeat(part[:1], ROWS - len(part), axis=0)])
      out.append(np.asarray(function(self._params, jnp.asarray(filled)))[: len(part)])
    return np.concatenate(out)

  def _similarity(self, images_KGYXC: np.ndarray, texts: list[str]) -> np.ndarray:
    """Cosines (G, K images, K texts)."""
    K, G = images_KGYXC.shape[:2]
    images = self._embed(self._image, images_KGYXC.reshape(K * G, *images_KGYXC.shape[2:]))
    return np.einsum(
      'KGD,JD->GKJ', images.reshape(K, G, -1), self._embed(self._text, self._experiment.captions(texts))
    )

  def terms(self, folder: pathlib.Path, records: list[dict[str, Any]]) -> list[float]:
    """Per held-out caption of a measurement, the mean term of its pictures; see
    `stats.information_terms`."""
    images = np.stack(
      [[image_files.load_image(folder / name) for name in r['images']] for r in records]
    )
    similarity = self._similarity(images, [r['prompt'] for r in records])
    return stats.information_terms(self._scale * similarity).mean(axis=0).tolist()


def measured(run: Run, critic: Critic, folder: pathlib.Path) -> study_tables.Done:
  """What the tables need of a complete run, kept in a folder once it has been worked out."""
  kept = folder / f'{run.variant}_seed{run.seed}.json.gz'
  if kept.is_file():
    return study_tables.load(kept)
  measurement = run.workdir / 'eval' / run.moment
  lines = (measurement / 'predictions.jsonl').read_text().splitlines()
  records = [r for r in map(json.loads, lines) if r['task'] != 'panel']
  drawn = [r for r in records if r['task'] == tasks.GENERATE and r['split'] == 'eval']
  seconds = json.loads((run.workdir / 'scores.json').read_text())['seconds']
  done = {
    'seed': run.seed,
    'variant': run.variant,
    'number': run.number,
    'records': records,
    'information': critic.terms(measurement, drawn),
    'seconds': sum(seconds.get(stage, 0.0) for stage in ('align', 'control')),
  }
  study_tables.save(kept, done)
  return study_tables.load(kept)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Does what has not been done of the study, and writes its tables.

  Raises:
    ValueError: the plan does not fit together, or the workdir holds another study.
  """
  runs = plan(config, workdir)
  folder = workdir / config.study
  workdir_lib.check_config(folder, config)
  workers = [Worker(cores, folder / 'compiled') for cores in shares(config.study.workers)]
  critic = Critic(runs[0].config, folder / 'critic')
  read = lambda: [measured(r, critic, folder / 'measured') for r in runs if complete(r)]
  for _ in execute(runs, workers):
    study_tables.write(folder, read())
  text = study_tables.write(folder, read())
  print(text, flush=True)
  logging.info('tables: %s', folder / 'study.md')
  return {}
