"""Tests of lvrpo_jax.config and of the guards at the door."""

import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from configs import base
from configs import tiny
from lvrpo_jax.runtime import validate

ROOT = pathlib.Path(__file__).resolve().parents[2]


def changed(**values):
  """The default config with other values; '__' stands for '.'."""
  config = base.get_config()
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in values.items()})
  return config


def bad_value(value):
  """A value of the same type that no check allows."""
  if isinstance(value, tuple):
    return ('bogus',)
  return 'bogus' if isinstance(value, str) else type(value)(-1)


class ValidateTest(parameterized.TestCase):
  def test_shipped_configs_pass(self):
    for module in (base, tiny):
      validate.validate(module.get_config())

  @parameterized.named_parameters(
    (key.replace('.', '_'), key, allowed) for key, (_, allowed) in validate.CHECKS
  )
  def test_bad_value_is_explained(self, key, allowed):
    config = base.get_config()
    value = bad_value(validate.get(config, key))
    config.update_from_flattened_dict({key: value})
    with self.assertRaises(ValueError) as caught:
      validate.validate(config)
    self.assertEqual(str(caught.exception), f'config.{key} is {value!r}; allowed: {allowed}')

  def test_no_key_is_checked_twice(self):
    keys = [key for key, _ in validate.CHECKS]
    self.assertLen(set(keys), len(keys))

  @parameterized.parameters(
    ('data__wrong', 1.5, 'between 0 and 1'),
    ('align__text_low', 2.0, 'between 0 and 1'),
    ('pretrain__ema', 1.0, 'below 1'),
    ('optimizer__b2', 1.0, 'below 1'),
    ('align__group', 1, 'at least 2'),
    ('align__steps_per_image', 1, 'at least 2'),
    ('pretrain__steps', 0, 'at least 1'),
    ('judge__batch', 1, 'at least 2'),
    ('data__describe', 1.5, 'between 0 and 1'),
    ('align__temperature', 0.0, 'above 0'),
    ('model__dtype', 'float16', "'float32', 'bfloat16'"),
    ('align__objective', 'SDE', "'nft', 'awm', 'sde'"),
    ('align__text_objective', 'ppo', "'grpo', 'dr_grpo'"),
    ('align__text_high', -0.1, 'at least 0'),
    ('align__scope', 'prompt', "'group', 'batch', 'none'"),
    ('model__heads', 5, 'divisor of config.model.width = 96'),
    ('model__kv_heads', 3, 'divisor of config.model.heads'),
    ('model__vit_heads', 5, 'divisor of config.model.vit_width = 96'),
    ('judge__heads', 5, 'divisor of config.dual_encoder.width = 96'),
    ('model__heads', 32, 'a head width'),
    ('parallel__micro_batches', 5, 'divisor of config.pretrain.'),
    ('pretrain__generate', -1, 'at least 0 rows'),
    ('pretrain__weights__edit', 0.0, 'above 0 where config.pretrain.rows.edit is not 0'),
    ('align__weights__understand', -1.0, 'above 0 where config.align.prompts.understand is not 0'),
    ('align__noise_low', 1.0, 'below config.align.rollout.noise_high = 1.0'),
  )
  def test_limit(self, name, value, allowed):
    key = name.replace('__', '.')
    with self.assertRaises(ValueError) as caught:
      validate.validate(changed(**{name: value}))
    message = str(caught.exception)
    self.assertStartsWith(
      message,
      f'config.{key} is {value}' if not isinstance(value, str) else f'config.{key} is {value!r}',
    )
    self.assertIn('; allowed: ', message)
    self.assertIn(allowed, message)

  @parameterized.parameters(
    ('data__wrong', 0.0),
    ('data__wrong', 1.0),
    ('align__group', 2),
    ('pretrain__ema', 0.0),
    ('align__velocity_penalty', 0.0),
    ('evaluate__guided', 0),
    ('model__remat', 'full'),
    ('model__remat', 'dots_saveable'),
    ('parallel__micro_batches', 8),
  )
  def test_allowed_limit_passes(self, name, value):
    validate.validate(changed(**{name: value}))

  def test_width_of_tables(self):
    with self.assertRaisesRegex(ValueError, 'config.model.width is 6; allowed: a multiple of 4'):
      validate.validate(changed(model__width=6, model__heads=1, model__kv_heads=1))

  def test_cispo_wants_its_own_bound(self):
    with self.assertRaisesRegex(
      ValueError,
      r'config.align.text.clip_high is 0.28; allowed: at least 1 '
      r"with config.align.text.objective = 'cispo'",
    ):
      validate.validate(changed(align__text_objective='cispo'))
    validate.validate(changed(align__text_objective='cispo', align__text_high=4.0))

  @parameterized.parameters('pretrain', 'align')
  def test_no_task(self, part):
    config = changed(**{f'{part}__{task}': 0 for task in validate.TASKS})
    with self.assertRaisesRegex(ValueError, f'config.{part}.generate.*all 0; allowed: at least'):
      validate.validate(config)

  def test_task_that_is_left_out_needs_no_weight(self):
    validate.validate(
      changed(
        pretrain__edit=0,
        pretrain__weights__edit=0.0,
        align__edit=0,
        align__rewards__edit__rules=0.0,
        align__rewards__edit__knowledge=0.0,
      )
    )

  def test_rewards(self):
    none = {
      f'align__rewards__understand__{name}': 0.0 for name in ('rules', 'semantic', 'knowledge')
    }
    with self.assertRaisesRegex(
      ValueError, r'config.align.rewards.understand is \{.*\}; allowed: at least one weight'
    ):
      validate.validate(changed(**none))
    validate.validate(changed(**none, align__custom__understand='a.b:c'))
    with self.assertRaisesRegex(
      ValueError, r"config.align.rewards.edit is \{.*'rules': -1.*\}; allowed: weights of at"
    ):
      validate.validate(changed(align__rewards__edit__rules=-1.0))

  def test_best_needs_a_score(self):
    no_rules = {f'align__rewards__{task}__rules': 0.0 for task in validate.TASKS}
    best = {'align__finish': 'best'}
    validate.validate(changed(**no_rules))
    validate.validate(changed(**best))
    validate.validate(changed(**best, **no_rules, align__score='reward/generate/semantic'))
    with self.assertRaisesRegex(
      ValueError, "config.align.checkpoints.finish is 'best'; allowed: 'last'"
    ):
      validate.validate(changed(**best, **no_rules))


class CommandLineTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('unknown_key', '--config.model.widht=3', 'widht'),
    ('wrong_type', '--config.model.width=wide', 'model.width'),
    (
      'impossible',
      '--config.align.rollout.group_size=1',
      'config.align.rollout.group_size is 1; allowed: an integer',
    ),
  )
  def test_bad_flag_stops_before_any_work(self, flag, message):
    workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / 'run'
    done = subprocess.run(
      [
        sys.executable,
        '-m',
        'lvrpo_jax.main',
        '--config=configs/tiny.py',
        f'--workdir={workdir}',
        flag,
      ],
      cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    self.assertNotEqual(done.returncode, 0)
    self.assertIn(message, done.stdout + done.stderr)
    self.assertFalse(workdir.exists())


if __name__ == '__main__':
  absltest.main()
