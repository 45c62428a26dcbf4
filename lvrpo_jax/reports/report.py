"""Turns the files of a run into one HTML page: `python -m lvrpo_jax.reports.report WORKDIR`.

Reads `config.json`, `metrics.jsonl`, `scores.json` and `eval/{before,after}/predictions.jsonl`.
Recomputes no score and starts no device. Whatever a run has not written yet is named as missing.
"""

from __future__ import annotations

import pathlib
import sys

from lvrpo_jax.reports import files
from lvrpo_jax.reports import html
from lvrpo_jax.reports import overview
from lvrpo_jax.reports import samples
from lvrpo_jax.reports import sections
from lvrpo_jax.reports import style

SCORE_AGAIN = """# every picture, answer, record and verdict; no model is needed to score them
WORKDIR/eval/{before,after}/predictions.jsonl

# write this page again
python -m lvrpo_jax.reports.report WORKDIR"""

Section = tuple[str, str, html.Html | None]
"""Anchor, title and content."""


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
  """Writes `<workdir>/report.html`, one page that needs no other file and no network.

  Args:
    workdir: the folder of a run, finished or not.

  Returns:
    The path of the page.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: a file is not the JSON it should be.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f'no such folder: {workdir}')
  scores = files.read_json(workdir / 'scores.json')
  measured = files.read_metrics(workdir / 'metrics.jsonl')
  config = files.read_json(workdir / 'config.json')
  over_optimization = sections.over_optimization_section(scores.get('panel', {}))
  page = _page(
    f'LVRPO run {workdir.resolve().name}',
    scores,
    [
      ('scores', 'Scores', overview.score_section(scores)),
      ('pictures', 'Pictures', samples.picture_section(workdir, scores)),
      ('edits', 'Edits', samples.edit_section(workdir, scores)),
      ('answers', 'Answers', samples.answer_section(workdir, scores)),
      ('curves', 'Curves', sections.curve_section(measured)),
      ('over-optimisation', 'Over-optimisation', over_optimization),
      ('timing', 'Timing', sections.timing_section(scores, measured)),
      ('config', 'Configuration', sections.config_section(config)),
      ('again', 'How to score again', html.el('pre', SCORE_AGAIN)),
    ],
  )
  path = workdir / 'report.html'
  partial = path.with_suffix('.html.tmp')
  partial.write_text('<!doctype html>\n' + page, encoding='utf-8')
  partial.replace(path)
  return path


def _page(title: str, scores: files.Json, parts: list[Section]) -> html.Html:
  """Writes the page around its sections."""
  head = html.el(
    'head',
    html.el('meta', charset='utf-8'),
    html.el('title', title),
    html.el('meta', name='viewport', content='width=device-width, initial-scale=1'),
    html.el('style', html.Html(style.STYLE)),
  )
  header = html.el(
    'header',
    html.el('div', 'Alignment report', class_='kicker'),
    html.el('h1', title),
    html.el('p', overview.summary(scores), class_='lead'),
    overview.stat_cards(scores),
  )
  links = [html.el('li', html.el('a', name, href=f'#{anchor}')) for anchor, name, _ in parts]
  bodies = [
    html.el('section', html.el('h2', name), body, id=anchor) for anchor, name, body in parts
  ]
  body = html.el(
    'body',
    header,
    html.el('nav', html.el('ul', *links)),
    html.el('main', *bodies),
    html.el('footer', f'Seed {scores["seed"]}.' if 'seed' in scores else None),
  )
  return html.el('html', head, body, lang='en')


def main(argv: list[str]) -> None:
  """Runs the command; see the module's docstring."""
  if len(argv) != 2:
    sys.exit('usage: python -m lvrpo_jax.reports.report WORKDIR')
  print(write_report(argv[1]))


if __name__ == '__main__':
  main(sys.argv)
