"""The study: many runs from shared pretraining, each with one change to the method.

    python -m lvrpo_jax.main --config=configs/study.py [--config.study.name=quick]

A variant of `config.study.variants` is the config with some values changed. It runs as a process of
its own in `<workdir>/<study>/seed<n>/<variant>`, `config.study.workers` at once. Pretraining and the
measurement after it are done once a seed and copied. A complete run is never repeated, and an
interrupted one is resumed. After every run `study.md` and `study.html` are written anew.
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
import ml_collections

from configs import from_json
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.programs import study_critic
from lvrpo_jax.reports import study_tables
from lvrpo_jax.runtime import preemption
from lvrpo_jax.runtime import validate
from lvrpo_jax.runtime import weights
from lvrpo_jax.runtime import workdir as workdir_lib

PRETRAINED = 'pretrained'
"""Folder of what the variants of a seed share; it lies beside theirs."""
SHARED = (
  *(f'checkpoints/{name}' for name in (weights.VAE, weights.DUAL_ENCODER, 'pretrain')),
  'eval/before',
)
"""Parts of that folder that the run of a variant begins with."""
POLL = 1.0
"""Seconds between two checks of the runs under way."""


class Run(NamedTuple):
  """A run of the study.

  Attributes:
    seed: of the run.
    variant: its name.
    number: its index among the runs of its seed.
    config: of the run.
    workdir: of the run.
    moment: folder of `eval` that holds its last measurement.
  """

  seed: int
  variant: str
  number: int
  config: types.Config
  workdir: pathlib.Path
  moment: str


def changed(config: types.Config, *changes: types.Config) -> types.Config:
  """Returns a copy of a config with some values changed.

  Raises:
    ValueError: a change names an unknown key, or gives a value of another type.
  """
  out = config.copy_and_resolve_references()
  out.lock()
  for change in changes:
    try:
      out.update(change.to_dict() if isinstance(change, ml_collections.ConfigDict) else change)
    except (KeyError, TypeError) as error:
      raise ValueError(f'a change of the study is {change}, which does not fit: {error}') from error
  return out


def plan(config: types.Config, workdir: pathlib.Path) -> list[Run]:
  """Returns all runs in order: a seed at a time, its pretraining first.

  Raises:
    ValueError: the study or a variant is unknown, or a variant is not a valid config.
  """
  name, plans, variants = config.study.name, config.study.plans, config.study.variants
  if name not in plans:
    raise ValueError(f'config.study.name is {name!r}; allowed: {sorted(plans)}')
  study = plans[name]
  for variant in study.variants:
    if variant not in variants:
      raise ValueError(
        f'config.study.plans.{name}.variants holds {variant!r}; allowed: {sorted(variants)}'
      )
  base = changed(config, study.changes, {'program': 'train'})
  base.study.unlock()
  base.study.workers = 1
  base.study.plans, base.study.variants = ml_collections.ConfigDict(), ml_collections.ConfigDict()
  changes = {
    PRETRAINED: {'program': 'pretrain'},
    **{variant: variants[variant] for variant in study.variants},
  }
  out = []
  for seed in study.seeds:
    for number, (variant, change) in enumerate(changes.items()):
      # The study's changes come last: they make it smaller, whatever steps a variant sets.
      run_config = changed(base, change, study.changes, {'seed': seed})
      try:
        validate.validate(run_config)
      except ValueError as error:
        raise ValueError(f'variant {variant!r} of the study: {error}') from error
      out.append(
        Run(
          seed=seed,
          variant=variant,
          number=number,
          config=run_config,
          workdir=workdir / name / f'seed{seed}' / variant,
          moment='before' if variant == PRETRAINED else 'after',
        )
      )
  return out


def complete(run: Run) -> bool:
  """Whether the last measurement of a run is done."""
  path = run.workdir / 'scores.json'
  return path.is_file() and run.moment in json.loads(path.read_text())


def prepare(run: Run, pretrained: Run) -> None:
  """Makes the workdir of a variant from the pretraining of its seed, in one rename."""
  if run.workdir.exists() or run.variant == PRETRAINED:
    return
  partial = run.workdir.with_suffix('.half')
  shutil.rmtree(partial, ignore_errors=True)
  for name in SHARED:
    if (pretrained.workdir / name).exists():  # A released dual encoder has no checkpoint.
      shutil.copytree(pretrained.workdir / name, partial / name)
  partial.rename(run.workdir)


class Worker:
  """Runs one variant after the other, each in a process of its own that is bound to some cores."""

  def __init__(self, cores: set[int], cache: pathlib.Path):
    """Sets the cores, {} for all, and the folder of compiled programs."""
    self._cores, self._cache = cores, cache
    self._process: subprocess.Popen[bytes] | None = None
    self.run: Run | None = None

  def start(self, run: Run) -> None:
    """Starts a run, whose output goes to `log` in its workdir."""
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
    """Returns the run that has ended since the last call, if any.

    Raises:
      RuntimeError: it failed.
    """
    run, process = self.run, self._process
    if run is None or process is None or process.poll() is None:
      return None
    self.run = self._process = None
    if process.returncode:
      last = (run.workdir / 'log').read_text().strip().split('\n')[-8:]
      raise RuntimeError(
        f'the run in {run.workdir} ended with status {process.returncode}; its log ends with\n  '
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
  """Binds processes that are started inside to these cores; {} binds none."""
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
  """Returns the cores of every worker; {} for a single one, or where cores cannot be chosen.

  Raises:
    ValueError: there are fewer cores than workers.
  """
  if workers == 1 or sys.platform != 'linux':
    return [set()] * workers
  cores = sorted(os.sched_getaffinity(0))
  if not 1 <= workers <= len(cores):
    raise ValueError(
      f'config.study.workers is {workers}; allowed: 1 to {len(cores)}, the cores at hand'
    )
  return [set(cores[index::workers]) for index in range(workers)]


def execute(runs: Sequence[Run], workers: Sequence[Worker]) -> Iterator[Run]:
  """Does the runs, as many at once as there are workers, and yields each when it is complete.

  Raises:
    preemption.Preempted: this process was asked to stop; the runs have saved.
    RuntimeError: a run failed.
  """
  pretrained = {run.seed: run for run in runs if run.variant == PRETRAINED}
  waiting = [run for run in runs if not complete(run)]
  total, start = len(waiting), time.monotonic()

  def is_ready(run: Run) -> bool:
    return run.variant == PRETRAINED or complete(pretrained[run.seed])

  with preemption.StopSignal() as stop:
    try:
      while waiting or any(worker.run for worker in workers):
        for worker in workers:
          ended = worker.finished()
          if ended is not None:
            yield ended
          if worker.run is not None:
            continue
          run = next((run for run in waiting if is_ready(run)), None)
          if run is not None:
            waiting.remove(run)
            prepare(run, pretrained[run.seed])
            worker.start(run)
            _log_start(
              run,
              number=total - len(waiting),
              total=total,
              workers=len(workers),
              spent_s=time.monotonic() - start,
            )
        if stop.asked():
          raise preemption.Preempted('study stopped; its runs have ended')
        time.sleep(POLL)
    finally:
      for worker in workers:
        worker.terminate()
      for worker in workers:
        worker.wait()


def _log_start(run: Run, number: int, total: int, workers: int, spent_s: float) -> None:
  """Logs that a run begins, and how far the study is."""
  done = max(number - workers, 0)
  left = f', about {spent_s / done * (total - done) / 60:.0f} minutes left' if done else ''
  logging.info(
    'study: run %d of %d (%s, seed %d), %.0f minutes so far%s',
    number,
    total,
    run.variant,
    run.seed,
    spent_s / 60,
    left,
  )


def measured(run: Run, critic: study_critic.Critic, folder: pathlib.Path) -> study_tables.Done:
  """Returns what the tables need from a complete run; computed once and kept in a folder."""
  kept = folder / f'{run.variant}_seed{run.seed}.json.gz'
  if kept.is_file():
    return study_tables.load(kept)
  measurement = run.workdir / 'eval' / run.moment
  lines = (measurement / 'predictions.jsonl').read_text().splitlines()
  records = [record for record in map(json.loads, lines) if record['task'] != 'panel']
  generated = [
    record for record in records if record['task'] == tasks.GENERATE and record['split'] == 'eval'
  ]
  seconds = json.loads((run.workdir / 'scores.json').read_text())['seconds']
  done = {
    'seed': run.seed,
    'variant': run.variant,
    'number': run.number,
    'records': records,
    'information': critic.terms(measurement, generated),
    'seconds': sum(seconds.get(stage, 0.0) for stage in ('align', 'control')),
  }
  study_tables.save(kept, done)
  return study_tables.load(kept)


def run(config: types.Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Does the runs of the study that are not complete, and writes its tables.

  Raises:
    ValueError: the plan is not valid, or the workdir holds another study.
  """
  runs = plan(config, workdir)
  folder = workdir / config.study.name
  workdir_lib.check_config(folder, config)
  workers = [Worker(cores, folder / 'compiled') for cores in shares(config.study.workers)]
  settings = config.study.critic
  own = {'seed': settings.seed, 'program': 'train', 'dual_encoder': {'path': ''}}
  critic = study_critic.Critic(
    changed(runs[0].config, settings.changes, own), settings.pairs, folder / 'critic'
  )

  def write_tables() -> str:
    done = [measured(one, critic, folder / 'measured') for one in runs if complete(one)]
    return study_tables.write(folder, done)

  for _ in execute(runs, workers):
    write_tables()
  text = write_tables()
  print(text, flush=True)
  logging.info('tables: %s', folder / 'study.md')
  return {}
