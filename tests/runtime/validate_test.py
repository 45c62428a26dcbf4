"""Values that a config may have, and what the command line says of those that it may not."""

import ast
import inspect
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from configs import bagel_1p5b
from configs import bagel_7b
from configs import base
from configs import base_control
from configs import paper
from configs import study
from configs import think
from configs import tiny
from lvrpo_jax.data import tasks
from lvrpo_jax.runtime import experiment
from lvrpo_jax.runtime import validate
from lvrpo_jax.training import align

ROOT = pathlib.Path(__file__).resolve().parents[2]


def changed(values, module=base):
  """The default config with other values, by their keys."""
  config = module.get_config()
  config.lock()  # No key is added by mistake.
  config.update_from_flattened_dict(values)
  return config


def bad_value(value):
  """A value of the same type that no check allows."""
  if isinstance(value, tuple):
    return ('bogus',)
  return 'bogus' if isinstance(value, str) else type(value)(-2)


class ValidateTest(parameterized.TestCase):
  def test_shipped_configs_pass(self):
    for module in (bagel_1p5b, bagel_7b, base, base_control, paper, study, think, tiny):
      validate.validate(module.get_config())

  @parameterized.named_parameters(
    (key.replace('.', '_'), key, check.allowed) for key, check in validate.CHECKS.items()
  )
  def test_bad_value_is_explained(self, key, allowed):
    config = base.get_config()
    value = bad_value(validate.get(config, key))
    config.update_from_flattened_dict({key: value})
    with self.assertRaises(ValueError) as caught:
      validate.validate(config)
    self.assertEqual(str(caught.exception), f'config.{key} is {value!r}; allowed: {allowed}')

  def test_no_key_is_checked_twice(self):
    """A dict would take the last of two checks and say nothing."""
    (parts,) = [
      node.value
      for node in ast.parse(inspect.getsource(validate)).body
      if isinstance(node, ast.AnnAssign) and node.target.id == 'CHECKS'
    ]
    keys = []
    for key, value in zip(parts.keys, parts.values, strict=True):
      found = eval(ast.unparse(value), vars(validate))
      keys += list(found) if key is None else [key.value]
    self.assertCountEqual(keys, validate.CHECKS)

  @parameterized.parameters(
    ('align.text.clip_low', 2.0, 'between 0 and 1'),
    ('pretrain.ema', 1.0, 'below 1'),
    ('pretrain.optimizer.b2', 1.0, 'below 1'),
    ('align.optimizer.b2', 1.0, 'below 1'),
    ('align.rollout.group_size', 1, 'at least 2'),
    ('align.rollout.steps', 1, 'at least 2'),
    ('pretrain.steps', 0, 'at least 1'),
    ('dual_encoder.batch', 1, 'at least 2'),
    ('align.rollout.temperature', 0.0, 'above 0'),
    ('model.dtype', 'float16', "'float32', 'bfloat16'"),
    ('align.text.clip_high', -0.1, 'at least 0'),
    ('align.advantage.scope', 'prompt', "'group', 'batch', 'none'"),
    ('align.advantage.method', 'SUM', "'normalize_then_sum', 'sum_then_normalize'"),
    ('align.checks.mismatch.text_max', -0.5, 'at least 0, or -1'),
    ('model.heads', 5, 'divisor of config.model.width = 96'),
    ('model.kv_heads', 3, 'divisor of config.model.heads'),
    ('model.vit_heads', 5, 'divisor of config.model.vit_width = 96'),
    ('dual_encoder.heads', 5, 'divisor of config.dual_encoder.width = 96'),
    ('model.heads', 32, 'a head width'),
    ('parallel.micro_batches', 5, 'divisor of config.pretrain.'),
    ('pretrain.rows.generate', -1, 'at least 0 rows'),
    ('pretrain.task_weights.edit', 0.0, 'above 0 where config.pretrain.rows.edit is not 0'),
    (
      'align.task_weights.understand',
      -1.0,
      'above 0 where config.align.prompts.understand is not 0',
    ),
    ('align.rollout.noise_low', 1.0, 'below config.align.rollout.noise_high = 1.0'),
    ('align.rewards.generate.knowledge.questions', 0, 'an integer of at least 1'),
    ('align.rewards.edit.mutual.questions', 0, 'an integer of at least 1'),
    ('align.rewards.generate.dense.top', 0, 'an integer of at least 1'),
    ('align.optimizer.learning_rate', float('nan'), 'finite numbers'),
  )
  def test_limit(self, key, value, allowed):
    with self.assertRaises(ValueError) as caught:
      validate.validate(changed({key: value}))
    message = str(caught.exception)
    self.assertStartsWith(message, f'config.{key} is {value!r}')
    self.assertIn('; allowed: ', message)
    self.assertIn(allowed, message)

  @parameterized.parameters(
    ('align.rollout.group_size', 2),
    ('pretrain.ema', 0.0),
    ('align.image.kl_weight', 0.0),
    ('evaluate.guided_prompts', 0),
    ('model.remat', 'full'),
    ('model.remat', 'dots_saveable'),
    ('parallel.micro_batches', 8),
    ('align.advantage.method', 'gdpo'),
    ('align.advantage.method', 'sum'),
    ('align.checks.mismatch.text_max', 0.0),
  )
  def test_allowed_limit_passes(self, key, value):
    validate.validate(changed({key: value}))

  def test_width_of_tables(self):
    with self.assertRaisesRegex(ValueError, 'config.model.width is 6; allowed: a multiple of 4'):
      validate.validate(changed({'model.width': 6, 'model.heads': 1, 'model.kv_heads': 1}))

  def test_cispo_wants_its_own_bound(self):
    cispo = {'align.text.objective': 'cispo'}
    with self.assertRaisesRegex(
      ValueError,
      r'config.align.text.clip_high is 0.28; allowed: at least 1 '
      r"with config.align.text.objective = 'cispo'",
    ):
      validate.validate(changed(cispo))
    validate.validate(changed({**cispo, 'align.text.clip_high': 4.0}))

  @parameterized.parameters('pretrain.rows', 'align.prompts')
  def test_no_task(self, counts):
    config = changed({f'{counts}.{task}': 0 for task in tasks.TASKS})
    with self.assertRaisesRegex(ValueError, f'config.{counts} .*all 0; allowed: at least'):
      validate.validate(config)

  def test_task_that_is_left_out_needs_no_weight(self):
    validate.validate(
      changed(
        {
          'pretrain.rows.edit': 0,
          'pretrain.task_weights.edit': 0.0,
          'align.prompts.edit': 0,
          'align.rewards.edit.rules.weight': 0.0,
          'align.rewards.edit.knowledge.weight': 0.0,
        }
      )
    )

  def test_rewards(self):
    key = 'align.rewards.understand'
    none = {f'{key}.{name}.weight': 0.0 for name in ('rules', 'semantic', 'knowledge')}
    with self.assertRaisesRegex(
      ValueError, f'config.{key} has no weight above 0; allowed: at least one reward'
    ):
      validate.validate(changed(none))
    alone = {**none, f'{key}.custom.weight': 1.0}
    validate.validate(changed({**alone, f'{key}.custom.kind': 'a.b:c'}))
    with self.assertRaisesRegex(
      ValueError, f"config.{key}.custom.kind is '' and its weight 1.0; allowed: the name of"
    ):
      validate.validate(changed(alone))
    with self.assertRaisesRegex(
      ValueError, r'config.align.rewards.edit.rules.weight is -1.0; allowed: at least 0'
    ):
      validate.validate(changed({'align.rewards.edit.rules.weight': -1.0}))

  def test_a_reward_of_any_name_is_a_dict(self):
    config = base.get_config()
    config.align.rewards.edit.mine = {'kind': 'a.b:c', 'weight': 1.0}
    validate.validate(config)
    for wrong in (1.0, {'weight': 1.0}, {'kind': 'a.b:c'}):
      config = base.get_config()
      config.align.rewards.edit.mine = wrong
      with self.assertRaisesRegex(
        ValueError, f'config.align.rewards.edit.mine is {wrong}; allowed: a dict with kind and'
      ):
        validate.validate(config)

  def test_a_count_of_a_reward_cannot_be_missing(self):
    config = base.get_config()
    config.align.rewards.edit.mine = {'kind': 'mutual', 'weight': 1.0}
    with self.assertRaisesRegex(
      ValueError, r'rewards.edit.mine.questions is None; allowed: an integer of at least 1'
    ):
      validate.validate(config)

  def test_best_needs_a_score(self):
    no_rules = {f'align.rewards.{task}.rules.weight': 0.0 for task in tasks.TASKS}
    best = {'align.checkpoints.finish': 'best'}
    scored = {'align.checkpoints.metric': 'reward/generate/semantic'}
    validate.validate(changed(no_rules))
    validate.validate(changed(best))
    validate.validate(changed({**best, **no_rules, **scored}))
    with self.assertRaisesRegex(
      ValueError, "config.align.checkpoints.finish is 'best'; allowed: 'last'"
    ):
      validate.validate(changed({**best, **no_rules}))


class OpenKindsTest(parameterized.TestCase):
  """What only the object behind a name can judge is refused as it is built, before any work."""

  def build(self, config):
    validate.validate(config)
    align.check(experiment.build(config, pathlib.Path('unused')))

  @parameterized.product(name=('wrong', 'chatty', 'plan', 'describe', 'drop'), value=(1.5, -0.1))
  def test_fraction_of_the_data(self, name, value):
    with self.assertRaisesRegex(
      ValueError, f'config.data.options.{name} is {value}; allowed: between 0 and 1'
    ):
      experiment.build_data(changed({f'data.options.{name}': value}), None)

  @parameterized.parameters(0.0, 1.0)
  def test_allowed_fraction_passes(self, value):
    experiment.build_data(changed({'data.options.wrong': value}), None)

  @parameterized.parameters(
    ('align.image.objective', 'SDE', "'diffusion_nft', 'awm', 'flow_grpo'"),
    ('align.text.objective', 'ppo', "'grpo', 'dr_grpo'"),
    ('align.rewards.generate.rules.kind', 'rulez', "'rules', 'semantic'"),
    ('align.rewards.generate.rules.detector', 'eyes', "'components', 'rendering'"),
    ('data.source', 'photos', "'shapes'"),
    ('model.family', 'unknown', "'bagel'"),
  )
  def test_unknown_name(self, key, value, expected):
    with self.assertRaises(ValueError) as caught:
      self.build(changed({key: value}, tiny))
    message = str(caught.exception)
    self.assertStartsWith(message, f'config.{key} is {value!r}, which cannot be imported')
    self.assertIn(f'; expected {expected}', message)
    self.assertEndsWith(message, "'package.module:name'")

  def test_a_reward_scores_what_its_task_samples(self):
    config = tiny.get_config()
    config.align.rewards.understand.words = {'kind': 'dense', 'weight': 1.0, 'top': 1}
    with self.assertRaisesRegex(
      ValueError, r"rewards.understand.words.kind is 'dense', which scores .*samples 'text'"
    ):
      self.build(config)


class CommandLineTest(parameterized.TestCase):
  def start(self, *flags):
    """Starts the program, which has to end before it makes its workdir."""
    workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / 'run'
    command = [sys.executable, '-m', 'lvrpo_jax.main', '--config=configs/tiny.py']
    done = subprocess.run(
      [*command, f'--workdir={workdir}', *flags],
      cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    self.assertFalse(workdir.exists())
    return done

  def test_impossible_value_stops_before_any_work(self):
    done = self.start('--config.align.rollout.group_size=1')
    self.assertEqual(done.returncode, 2)
    self.assertIn('config.align.rollout.group_size is 1; allowed: an integer', done.stderr)
    self.assertNotIn('Traceback', done.stderr)

  @parameterized.named_parameters(
    (
      'unknown_key',
      '--config.align.stepss=3',
      'config.align.stepss is no key of the config; the nearest key is config.align.rollout.steps',
    ),
    (
      'former_key',
      '--config.align.steps=3',
      'config.align.steps was renamed; the present name is config.align.iterations',
    ),
    (
      'former_key_of_a_section',
      '--config.study=quick',
      'config.study was renamed; the present name is config.study.name',
    ),
    (
      'section',
      '--config.align.rollout=3',
      'config.align.rollout is a section of the config; it has keys such as '
      'config.align.rollout.group_size',
    ),
    (
      'wrong_type',
      '--config.model.width=wide',
      "flag --config.model.width=wide: invalid literal for int() with base 10: 'wide'",
    ),
    ('unknown_flag', '--workdri=x', "Unknown command line flag 'workdri'. Did you mean: workdir ?"),
  )
  def test_bad_flag_is_one_line(self, flag, line):
    done = self.start(flag)
    self.assertEqual(done.returncode, 2)
    self.assertEqual((done.stdout, done.stderr), ('', f'{line}\n'))


if __name__ == '__main__':
  absltest.main()
