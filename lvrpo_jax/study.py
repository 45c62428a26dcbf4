"""The study: many runs from shared pretraining, and what each change to the method is worth.

    python -m lvrpo_jax.main --config=configs/study.py [--config.study=quick]

Every variant of `config.variants` is the config with some values changed, run as a process of its own
in `<workdir>/<study>/seed<n>/<variant>`, one after the other. Pretraining and the measurement after it
are done once a seed and copied. A run that is complete is never repeated, one that was interrupted
goes on, and after every run `study.md` and `study.html` are written anew.
"""

from __future__ import annotations

from collections.abc import Iterator
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

from lvrpo_jax import checkpoint
from lvrpo_jax import config as config_lib
from lvrpo_jax import job as job_lib
from lvrpo_jax import metrics as metrics_lib
from lvrpo_jax import policy as policy_lib
from lvrpo_jax import pretrain
from lvrpo_jax import saved
from lvrpo_jax import stats
from lvrpo_jax import study_tables
from lvrpo_jax import weights
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import pipeline

PRETRAINED = 'pretrained'
"""Folder, beside those of the variants, of what they share."""
SHARED = ('checkpoints/vae', 'checkpoints/judge', 'checkpoints/pretrain', 'eval/before')
"""What a run of a variant takes over from it."""
ROWS = 60
"""Images that the critic reads at once."""


class Run(NamedTuple):
  """A run of the study; `moment` is the folder of `eval` that holds its measurement."""
  seed: int
  variant: str
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
  if config.study not in config.studies:
    raise ValueError(f'config.study is {config.study!r}; allowed: {sorted(config.studies)}')
  study = config.studies[config.study]
  for name in study.variants:
    if name not in config.variants:
      raise ValueError(f'config.studies.{config.study}.variants holds {name!r}; allowed: '
                       f'{sorted(config.variants)}')
  base = changed(config, study.changes, {'program': 'run'})
  base.unlock()
  base.variants, base.studies = {}, {}
  out = []
  for seed in study.seeds:
    names = {PRETRAINED: {'program': 'pretrain'}, **{n: config.variants[n] for n in study.variants}}
    for name, change in names.items():
      # What makes a study smaller holds, whatever steps a variant wants.
      mine = changed(base, change, study.changes, {'seed': seed})
      try:
        config_lib.validate(mine)
      except ValueError as error:
        raise ValueError(f'variant {name!r} of the study: {error}') from error
      out.append(Run(seed, name, mine, workdir / config.study / f'seed{seed}' / name,
                     'before' if name == PRETRAINED else 'after'))
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


def execute(run: Run, cache: pathlib.Path) -> None:
  """Runs one variant in a process of its own; its output goes to `log` in its workdir.

  Raises:
    checkpoint.Preempted: this process was asked to stop; the run has saved.
    RuntimeError: the run failed.
  """
  run.workdir.mkdir(parents=True, exist_ok=True)
  wanted = run.workdir / 'wanted.json'
  checkpoint.write_json(wanted, json.loads(run.config.to_json()))
  command = [sys.executable, '-m', 'lvrpo_jax.main', f'--config={saved.__file__}:{wanted}',
             f'--workdir={run.workdir}']
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache.resolve())}
  with (run.workdir / 'log').open('a') as log, checkpoint.StopSignal() as stop:
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
      while process.poll() is None:
        if stop.asked(0):
          process.terminate()
          process.wait()
          raise checkpoint.Preempted(f'study stopped in {run.workdir}')
        time.sleep(1)
    finally:
      if process.poll() is None:
        process.terminate()
        process.wait()
  if process.returncode:
    last = (run.workdir / 'log').read_text().strip().split('\n')[-8:]
    raise RuntimeError(f'the run in {run.workdir} ended with status {process.returncode}; its log '
                       'ends with\n  ' + '\n  '.join(last))


class Critic:
  """A dual encoder that pays no reward: how much its texts tell of pictures, in nats.

  It has a seed, a world and batches of its own; the scale of its logits is set on true pairs that no
  variant has seen (a critic may be chosen in any way that does not see what it is used on).
  """

  def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path):
    """Trains the critic, or reads it back from the folder."""
    c = config.critic
    mine = changed(config, c.changes, {'seed': c.seed, 'program': 'run'})
    self._job = job_lib.build(mine, folder)
    writer = metrics_lib.MetricWriter(folder)
    self._params = weights.kept(folder, weights.JUDGE, weights.template(self._job, weights.JUDGE),
                                lambda: pretrain.train_judge(self._job, writer))
    writer.close()
    self._image = jax.jit(lambda p, x: self._job.judge.apply(
        {'params': p}, policy_lib.to_unit(x), method='embed_image')[0])
    self._text = jax.jit(lambda p, ids: self._job.judge.apply(
        {'params': p}, ids, method='embed_text')[0])
    pairs = [self._job.data.pretraining(pipeline.GENERATE, pretrain.CONTROL_OFFSET + i)
             for i in range(c.pairs)]
    similarity = self._similarity(np.stack([e.target for e in pairs])[:, None],
                                  [e.prompt for e in pairs])
    scales = np.geomspace(1., 200., 40)
    means = [stats.information_terms(scale * similarity).mean() for scale in scales]
    self._scale = float(scales[int(np.argmax(means))])

  def _embed(self, function: Any, rows: np.ndarray) -> np.ndarray:
    """Vectors of rows, a part of one size at a time."""
    out = []
    for start in range(0, len(rows), ROWS):
      part = rows[start:start + ROWS]
      filled = np.concatenate([part, np.repeat(part[:1], ROWS - len(part), axis=0)])
      out.append(np.asarray(function(self._params, jnp.asarray(filled)))[:len(part)])
    return np.concatenate(out)

  def _similarity(self, images_KGYXC: np.ndarray, texts: list[str]) -> np.ndarray:
    """Cosines (G, K images, K texts)."""
    K, G = images_KGYXC.shape[:2]
    images = self._embed(self._image, images_KGYXC.reshape(K * G, *images_KGYXC.shape[2:]))
    return np.einsum('KGD,JD->GKJ', images.reshape(K, G, -1),
                     self._embed(self._text, self._job.captions(texts)))

  def terms(self, folder: pathlib.Path, records: list[dict[str, Any]]) -> list[float]:
    """Per held-out caption of a measurement, the mean term of its pictures; see
    `stats.information_terms`."""
    images = np.stack([[image_files.load_image(folder / name) for name in r['images']]
                       for r in records])
    similarity = self._similarity(images, [r['prompt'] for r in records])
    return stats.information_terms(self._scale * similarity).mean(axis=0).tolist()


def measured(run: Run, critic: Critic) -> dict[str, Any]:
  """What the tables need of a complete run, kept in its folder once it has been worked out."""
  folder = run.workdir / 'eval' / run.moment
  kept = folder / 'information.json'
  records = [r for r in map(json.loads, (folder / 'predictions.jsonl').read_text().splitlines())
             if r['task'] != 'panel']
  if not kept.is_file():
    drawn = [r for r in records if r['task'] == pipeline.GENERATE and r['split'] == 'eval']
    checkpoint.write_json(kept, critic.terms(folder, drawn))
  seconds = json.loads((run.workdir / 'scores.json').read_text())['seconds']
  return {'seed': run.seed, 'variant': run.variant, 'records': records,
          'information': json.loads(kept.read_text()),
          'seconds': sum(seconds.get(stage, 0.) for stage in ('align', 'control'))}


def announced(runs: list[Run]) -> Iterator[Run]:
  """The runs that are to be done, with a line before each that says how far the study is."""
  waiting = [run for run in runs if not complete(run)]
  start = time.monotonic()
  for number, run in enumerate(waiting):
    spent = time.monotonic() - start
    left = f', about {spent / number * (len(waiting) - number) / 60:.0f} minutes left' if number else ''
    logging.info('study: run %d of %d (%s, seed %d), %.0f minutes so far%s',
                 len(runs) - len(waiting) + number + 1, len(runs), run.variant, run.seed,
                 spent / 60, left)
    yield run


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Does what has not been done of the study, and writes its tables.

  Raises:
    ValueError: the plan does not fit together, or the workdir holds another study.
  """
  runs = plan(config, workdir)
  folder = workdir / config.study
  checkpoint.check_config(folder, config)
  critic = Critic(runs[0].config, folder / 'critic')
  pretrained = {r.seed: r for r in runs if r.variant == PRETRAINED}
  for one in announced(runs):
    prepare(one, pretrained[one.seed])
    execute(one, folder / 'compiled')
    done = [measured(r, critic) for r in runs if complete(r)]
    study_tables.write(folder, done)
  text = study_tables.write(folder, [measured(r, critic) for r in runs])
  print(text, flush=True)
  logging.info('tables: %s', folder / 'study.md')
  return {}
