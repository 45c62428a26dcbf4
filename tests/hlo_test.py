"""Tests of lvrpo_jax.hlo: counted by hand on small programs, and on one that XLA has compiled."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp

from lvrpo_jax import hlo

TEXT = '''
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%pick (p: f32[8,16], i: s32[]) -> f32[1,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,16]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,16}
}

%all-reduce-scatter.1 (x: bf16[64]) -> bf16[16] {
  %x = bf16[64]{0} parameter(0)
  %ar = bf16[64]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%sum
  %z = s32[] constant(0)
  ROOT %cut = bf16[16]{0} dynamic-slice(%ar, %z), dynamic_slice_sizes={16}
}

%body (state: (s32[], f32[8,16], bf16[16])) -> (s32[], f32[8,16], bf16[16]) {
  %state = (s32[], f32[8,16]{1,0}, bf16[16]{0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %table = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %part = bf16[16]{0} get-tuple-element(%state), index=2
  %row.1 = f32[1,16]{1,0} fusion(%table, %n), kind=kLoop, calls=%pick
  %gathered = bf16[64]{0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}
  %kept = bf16[16]{0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], f32[8,16]{1,0}, bf16[16]{0}) tuple(%n, %table, %kept)
}

%condition (state.1: (s32[], f32[8,16], bf16[16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}, bf16[16]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%n.1, %limit), direction=LT
}

ENTRY %main (s: (s32[], f32[8,16], bf16[16]), y: f32[32]) -> f32[32] {
  %s = (s32[], f32[8,16]{1,0}, bf16[16]{0}) parameter(0)
  %y = f32[32]{0} parameter(1)
  %loop = (s32[], f32[8,16]{1,0}, bf16[16]{0}) while(%s), condition=%condition, body=%body
  %sent = f32[32]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %total = f32[32]{0} all-reduce(%sent), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'a'}, to_apply=%sum
}
'''


class HloTest(parameterized.TestCase):

  def test_size(self):
    self.assertEqual(hlo.size('bf16[4,8]{1,0:T(8,128)}'), 64)
    self.assertEqual(hlo.size('(f32[3]{0}, s32[], pred[2,2], token[])'), 12 + 4 + 4)

  def test_loops_run_as_often_as_their_condition_says(self):
    trips = hlo.trips(TEXT)
    self.assertEqual((trips['main'], trips['body'], trips['pick']), (1, 5, 5))
    known = TEXT.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    self.assertEqual(hlo.trips(known)['body'], 7)
    self.assertEqual(hlo.trips(TEXT.replace('constant(5)', 'iota()'), unknown=3)['body'], 3)

  def test_collectives(self):
    """Five passes gather 64 values among four and scatter as many; a pair sums 32 floats."""
    self.assertEqual(hlo.collectives(TEXT, 8), {
        'all-gather': 5 * 128 * 3 / 4, 'reduce-scatter': 5 * 128 * 3 / 4,
        'all-reduce': 2 * 128 / 2, 'all-to-all': 0., 'collective-permute': 128.})

  def test_memory(self):
    """Only the row that a fusion cuts out of its operand counts, not the table."""
    row, gather, scatter, rest = 2 * 64 + 4, 32 + 128, 128 + 32, 4 * 128
    compare = 4 + 4 + 1
    self.assertEqual(hlo.memory_traffic(TEXT), 5 * (row + gather + scatter + compare) + rest)

  def test_a_compiled_loop(self):
    def function(x, w_EDD):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_EDD)[0]
    shapes = jnp.zeros((4, 64)), jnp.zeros((6, 64, 64))
    text = jax.jit(function).lower(*shapes).compile().as_text()
    self.assertEqual(max(hlo.trips(text).values()), 6)
    weights = 6 * 64 * 64 * 4
    self.assertBetween(hlo.memory_traffic(text), weights, 4 * weights)
    self.assertEqual(sum(hlo.collectives(text, 1).values()), 0.)


if __name__ == '__main__':
  absltest.main()
