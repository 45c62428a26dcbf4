"""Former keys, values and configs: refused with the present name, or translated as they are read."""

import json
import pathlib
import re
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import ml_collections

from configs import base
from configs import from_json
from lvrpo_jax.data import tasks
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.runtime import renamed
from lvrpo_jax.runtime import validate
from lvrpo_jax.runtime import workdir as workdir_lib

FORMER_FILE = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'former_config.json'
"""The `config.json` of a run with the defaults of the last version before keys were renamed."""

NEW_KEYS = {
  'model.family',
  'dual_encoder.path',
  'align.advantage.clip',
  *(
    f'align.optimizer.{name}'
    for name in ('kind', 'muon_rate', 'schedule', 'warmup', 'b1', 'b2', 'eps', 'weight_decay')
  ),
  *(
    f'align.rewards.{task}.{name}.kind'
    for task in tasks.TASKS
    for name in ('rules', 'semantic', 'dense', 'knowledge', 'mutual', 'remote')
    if (task, name) != ('understand', 'dense')
  ),
}
"""Keys of the default config that no former key stands for."""


def former():
  """The former config, flat."""
  return workdir_lib.flatten(json.loads(FORMER_FILE.read_text()))


def present():
  """The default config, flat, as JSON holds it."""
  return workdir_lib.flatten(json.loads(base.get_config().to_json()))


def present_keys(name):
  """The present keys in a cell of `renamed.KEYS`, which may be a sentence."""
  first, *others = name.replace('<task>', 'generate').split(' (')[0].split(' and ')
  before = first.rsplit('.', 2)[0]
  return [first, *(f'{before}{other}' if other.startswith('.') else other for other in others)]


class FormerKeysTest(parameterized.TestCase):
  @parameterized.parameters(*renamed.KEYS.items())
  def test_every_former_key_names_the_present_one(self, key, name):
    known = present()
    self.assertEqual(
      renamed.explain(key, known), f'config.{key} was renamed; the present name is config.{name}'
    )
    for found in present_keys(name):
      validate.get(base.get_config(), found)

  def test_no_present_key_counts_as_former(self):
    self.assertEmpty([key for key in present() if renamed.present_name(key)])

  def test_a_config_with_a_former_key_is_refused(self):
    known, refused = present(), 0
    for key, value in former().items():
      if key in known:
        continue
      name = renamed.present_name(key)
      self.assertNotEmpty(name, key)
      if key in renamed.SECTIONS:  # No value can take the place of a section.
        continue
      config = base.get_config()
      *sections, last = key.split('.')
      section = config
      for part in sections:
        if part not in section:
          section[part] = ml_collections.ConfigDict()
        section = section[part]
      section[last] = value
      with self.assertRaises(ValueError) as caught:
        validate.validate(config)
      self.assertEqual(
        str(caught.exception), f'config.{key} was renamed; the present name is config.{name}'
      )
      refused += 1
    self.assertGreater(refused, 100)

  @parameterized.parameters(
    ('optimizer.b1', 'pretrain.optimizer.b1'),
    ('align.remote.url', 'align.remote_judge.url'),
    ('align.custom.edit', 'align.rewards.edit.custom.kind'),
    ('align.custom.edit_weight', 'align.rewards.edit.custom.weight'),
    ('align.rewards.edit.rules', 'align.rewards.edit.rules.weight'),
    ('align.advantage', 'align.advantage.method'),
  )
  def test_keys_inside_a_former_section(self, key, name):
    self.assertEqual(renamed.present_name(key), name)

  @parameterized.parameters(
    ('align.stepss', 'align.rollout.steps'),
    ('model.widht', 'model.width'),
    ('study.nmae', 'study.name'),
    ('align.advantage.methd', 'align.advantage.method'),
  )
  def test_the_nearest_key(self, key, near):
    self.assertEqual(
      renamed.explain(key, present()),
      f'config.{key} is no key of the config; the nearest key is config.{near}',
    )

  @parameterized.parameters(
    ('program', 'run', 'train'),
    ('align.image.objective', 'nft', 'diffusion_nft'),
    ('align.image.objective', 'sde', 'flow_grpo'),
    ('align.image.objective', 'cps', 'flow_cps'),
    ('align.image.objective', 'guard', 'grpo_guard'),
    ('align.image.objective', 'guard_plain', 'grpo_guard_plain'),
  )
  def test_former_values(self, key, value, name):
    config = base.get_config()
    config.update_from_flattened_dict({key: value})
    with self.assertRaises(ValueError) as caught:
      validate.validate(config)
    self.assertEqual(
      str(caught.exception),
      f'config.{key} is {value!r}, which was renamed; the present name is {name!r}',
    )


class TranslateTest(absltest.TestCase):
  def test_a_former_default_is_the_present_default(self):
    found, wanted = renamed.translate(former()), present()
    self.assertEqual(wanted.keys() - found.keys(), NEW_KEYS)
    limits = {
      f'align.checks.mismatch.{name}': value for name, value in mismatch.LIMITS['float32'].items()
    }
    for key in limits:  # The dtype's own, which the file spells out.
      self.assertEqual(wanted[key], -1.0)
    self.assertEqual(found, {**{key: wanted[key] for key in wanted.keys() - NEW_KEYS}, **limits})

  def test_a_former_file_is_a_config(self):
    config = from_json.get_config(str(FORMER_FILE))
    validate.validate(config)
    present = dict(validate.leaves(base.get_config()))
    different = {key for key, value in validate.leaves(config) if value != present[key]}
    self.assertEqual(
      different,
      {
        f'align.checks.mismatch.{name}'
        for name in ('text_max', 'text_mean', 'decode_max', 'image_max')
      },
    )

  def test_a_present_config_stays(self):
    self.assertEqual(renamed.translate(present()), present())

  def translated(self, **changes):
    """What differs from the translated defaults, where some former values do ('__' is '.')."""
    changes = {key.replace('__', '.'): value for key, value in changes.items()}
    plain, found = renamed.translate(former()), renamed.translate({**former(), **changes})
    return {key: value for key, value in found.items() if plain.get(key) != value}

  def test_one_key_may_become_several(self):
    self.assertEqual(
      self.translated(sampling__shift=3.0), {'evaluate.shift': 3.0, 'align.rollout.shift': 3.0}
    )
    self.assertEqual(
      self.translated(align__adapt=0.2),
      {'align.text.kl_adaptation': 0.2, 'align.image.kl_adaptation': 0.2},
    )
    self.assertEqual(
      self.translated(align__graded=False),
      {f'align.rewards.{task}.rules.graded': False for task in tasks.TASKS},
    )
    self.assertEqual(
      self.translated(align__questions=4),
      {
        f'align.rewards.{task}.{name}.questions': 4
        for task in tasks.TASKS
        for name in ('knowledge', 'mutual')
      },
    )
    self.assertEqual(
      self.translated(align__dense_top=3),
      {f'align.rewards.{task}.dense.top': 3 for task in ('generate', 'edit', 'think_generate')},
    )

  def test_values_have_their_present_names(self):
    self.assertEqual(
      self.translated(
        program='pretrain', align__objective='sde', align__advantage='sum', sample__points=20
      ),
      {
        'program': 'pretrain',
        'align.image.objective': 'flow_grpo',
        'align.advantage.method': 'sum_then_normalize',
        'sample.steps': 19,
      },
    )

  def test_a_reward_of_ones_own_keeps_its_weight(self):
    self.assertEqual(
      self.translated(align__custom__edit='a.b:c'),
      {'align.rewards.edit.custom.kind': 'a.b:c', 'align.rewards.edit.custom.weight': 1.0},
    )
    # Without a function its weight, 1 by default, meant nothing.
    self.assertEqual(self.translated(align__custom__edit_weight=2.0), {})

  def test_changes_of_a_study_are_translated(self):
    self.assertEqual(
      self.translated(
        study='mine',
        variants__paper__align__advantage='sum',
        variants__paper__align__rewards__edit__rules=0.5,
        studies__mine__seeds=[1],
        studies__mine__changes__align__steps=3,
        critic__changes__judge__steps=5,
      ),
      {
        'study.name': 'mine',
        'study.variants.paper.align.advantage.method': 'sum_then_normalize',
        'study.variants.paper.align.rewards.edit.rules.weight': 0.5,
        'study.plans.mine.seeds': [1],
        'study.plans.mine.changes.align.iterations': 3,
        'study.critic.changes.dual_encoder.steps': 5,
      },
    )

  def test_a_former_run_goes_on(self):
    workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (workdir / 'config.json').write_text(FORMER_FILE.read_text())
    with self.assertLogs('absl', 'WARNING') as logs:
      workdir_lib.compare_config(workdir, base.get_config())
    (line,) = logs.output
    self.assertEqual(set(re.findall(r'([\w.]+) = ', line)), NEW_KEYS)
    other = base.get_config()
    other.align.iterations = 3
    with self.assertRaisesRegex(ValueError, 'align.iterations: 70 there, 3 here'):
      workdir_lib.compare_config(workdir, other)


if __name__ == '__main__':
  absltest.main()
