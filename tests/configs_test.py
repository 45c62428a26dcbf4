"""Tests of the configs: every section is an object of its own."""

from absl.testing import absltest
from absl.testing import parameterized
import ml_collections

from configs import bagel_1p5b
from configs import bagel_7b
from configs import base
from configs import base_control
from configs import paper
from configs import study
from configs import think
from configs import tiny

CONFIGS = {
  module.__name__: module.get_config
  for module in (bagel_1p5b, bagel_7b, base, base_control, paper, study, think, tiny)
}


def sections(config, prefix=''):
  """Names and sections, the nested ones too."""
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield prefix + name, value
      yield from sections(value, f'{prefix}{name}.')


class SectionsTest(parameterized.TestCase):
  @parameterized.parameters(*CONFIGS)
  def test_no_two_names_share_a_section(self, name):
    """A change to one of them would reach the other."""
    found = {}
    for path, section in sections(CONFIGS[name]()):
      if not path.startswith('study.variants.'):  # Changes, which nothing changes in their turn.
        self.assertNotIn(id(section), found, f'{path} is {found.get(id(section))}')
        found[id(section)] = path

  def test_rewards_of_a_task_are_its_own(self):
    config = base.get_config()
    config.align.rewards.generate.rules.weight = 0.25
    weights = {task: rewards.rules.weight for task, rewards in config.align.rewards.items()}
    self.assertEqual(weights, dict(generate=0.25, understand=1.0, edit=1.0, think_generate=1.0))


if __name__ == '__main__':
  absltest.main()
