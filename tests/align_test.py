"""Tests of lvrpo_jax.align that need no model; `end_to_end_test` runs the loop."""

import math

from absl.testing import absltest

from lvrpo_jax import align

SCALARS = {'accuracy/generate/correct': .2, 'accuracy/edit/correct': .6,
           'accuracy/understand/format': 1., 'reward/generate/rules': .9}


class ScoreTest(absltest.TestCase):

  def test_default_is_what_is_correct(self):
    self.assertAlmostEqual(align.score(SCALARS, ''), .4)
    self.assertTrue(math.isnan(align.score({'loss': 1.}, '')))

  def test_any_metric(self):
    self.assertEqual(align.score(SCALARS, 'reward/generate/rules'), .9)
    with self.assertRaisesRegex(ValueError, "config.align.score is 'reward'; allowed: .*rules"):
      align.score(SCALARS, 'reward')


if __name__ == '__main__':
  absltest.main()
