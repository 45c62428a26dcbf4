"""The study: compares parts of the method at equal compute, over three seeds.

    python -m lvrpo_jax.main --config=configs/study.py                       # about 3 hours
    python -m lvrpo_jax.main --config=configs/study.py --config.study.name=quick  # about 20 minutes

The study uses two CPU cores, with one run on each (`config.study.workers`). Every variant starts
from the pretrained model of its seed and is evaluated on the same held-out prompts and noise.
Finished runs are kept: the same command continues an interrupted study.

Models are pretrained four times as long as in the default job, until further pretraining helps
little, as alignment is applied to models that have converged on their data. Alignment runs 70
iterations with 24 groups of 8 images: 336,000 passes of an image through the policy (10 to sample,
15 for the mismatch and the updates). 'control' and 'repa' have as many in 2,333 further steps of
pretraining with 144 noised images each, which takes five times as long.
"""

from ml_collections import config_dict

from configs import base
from configs import paper

TASKS = ('generate', 'understand', 'edit')
COMPONENTS = ('rules', 'semantic', 'knowledge', 'mutual')


def only(*names: str, questions: int = 1) -> dict[str, dict]:
  """Returns changes that give the rewards named weight 1 and others weight 0, for every task.

  Args:
    names: of `COMPONENTS`.
    questions: count of a prompt's questions that 'mutual' asks in an iteration.
  """
  rewards = {name: dict(weight=float(name in names)) for name in COMPONENTS}
  rewards['mutual']['questions'] = questions
  return dict(align=dict(rewards=dict.fromkeys(TASKS, rewards)))


def rows(generate: int, understand: int, edit: int) -> dict[str, dict]:
  """Returns changes that set the prompts of every task in an iteration."""
  return dict(align=dict(prompts=dict(generate=generate, understand=understand, edit=edit)))


VARIANTS = {
  'default': {},
  'paper': paper.CHANGES,
  'sum': dict(align=dict(advantage=dict(method='sum_then_normalize'))),
  'low_floor': dict(align=dict(advantage=dict(floor=0.005))),
  'control': dict(program='control', control=dict(steps=2333)),
  'repa': dict(program='control', control=dict(steps=2333, repa=0.5)),
  'rules': only('rules'),
  'semantic': only('semantic'),
  'knowledge': only('knowledge'),
  'mutual': only('mutual', questions=4),
  'rules_mutual': only('rules', 'mutual', questions=4),
  'generation': rows(24, 0, 0),
  'understanding': rows(0, 96, 0),
  'both': rows(24, 32, 0),
  'objectives': dict(align={part: paper.CHANGES['align'][part] for part in ('image', 'text')}),
}
"""Changes to the default job, by variant; the others are compared with 'default'."""

QUICK = dict(
  pretrain=dict(steps=400),
  align=dict(iterations=20),
  control=dict(steps=150),
  evaluate=dict(prompts=dict(generate=30, unseen=30, understand=30, edit=30)),
)


def get_config() -> base.Config:
  """Returns the configuration of the study."""
  config = base.get_config()
  config.program = 'study'
  config.report = False
  config.study.workers = 2
  config.evaluate.guided_prompts = 0
  config.study.variants = config_dict.ConfigDict(VARIANTS)
  config.study.plans = config_dict.ConfigDict(
    {
      'full': dict(
        seeds=(0, 1, 2), variants=tuple(VARIANTS), changes=dict(pretrain=dict(steps=3200))
      ),
      'quick': dict(
        seeds=(0,), variants=('default', 'paper', 'control', 'rules_mutual'), changes=QUICK
      ),
    }
  )
  return config
