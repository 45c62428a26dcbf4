"""Tests of HLO counts: by hand on small programs, and on one that XLA has compiled."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp

from lvrpo_jax.aot import hlo
from lvrpo_jax.aot import hlo_text

TEXT = """
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
  %one = s32[] constant(1)
  %n.5 = s32[] add(%n, %one)
  ROOT %out = (s32[], f32[8,16]{1,0}, bf16[16]{0}) tuple(%n.5, %table, %kept)
}

%condition (state.1: (s32[], f32[8,16], bf16[16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}, bf16[16]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%n.1, %limit), direction=LT
}

%double (p.2: u32[], q: u32[]) -> u32[] {
  %p.2 = u32[] parameter(0)
  %q = u32[] parameter(1)
  ROOT %twice = u32[] add(%p.2, %q)
}

%window_body (state.2: (f32[6], u32[])) -> (f32[6], u32[]) {
  %state.2 = (f32[6]{0}, u32[]{:T(128)}) parameter(0)
  %wide = f32[6]{0} get-tuple-element(%state.2), index=0
  %n.2 = u32[]{:T(128)} get-tuple-element(%state.2), index=1
  %n.3 = u32[]{:T(128)S(6)} copy(%n.2)
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} fusion(%n.3, %two), kind=kLoop, calls=%double
  %shifted = f32[6]{0} collective-permute(%wide), source_target_pairs={{0,1},{1,0}}
  ROOT %out.2 = (f32[6]{0}, u32[]{:T(128)}) tuple(%shifted, %next)
}

%window_condition (state.3: (f32[6], u32[])) -> pred[] {
  %state.3 = (f32[6]{0}, u32[]{:T(128)}) parameter(0)
  %n.4 = u32[]{:T(128)} get-tuple-element(%state.3), index=1
  %limit.1 = u32[]{:T(128)} constant(8)
  ROOT %less.1 = pred[]{:T(512)} compare(%n.4, %limit.1), direction=LT
}

ENTRY %main (s: (s32[], f32[8,16], bf16[16]), y: f32[32]) -> f32[32] {
  %s = (s32[], f32[8,16]{1,0}, bf16[16]{0}) parameter(0)
  %y = f32[32]{0} parameter(1)
  %loop = (s32[], f32[8,16]{1,0}, bf16[16]{0}) while(%s), condition=%condition, body=%body
  %first = u32[]{:T(128)} constant(1)
  %edge = f32[6]{0} constant({1, 2, 3, 4, 5, 6})
  %pair = (f32[6]{0}, u32[]{:T(128)}) tuple(%edge, %first)
  %window = (f32[6]{0}, u32[]{:T(128)}) while(%pair), condition=%window_condition, body=%window_body
  %sent = f32[32]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %total = f32[32]{0} all-reduce(%sent), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'a'}, to_apply=%sum
}
"""


class HloTest(parameterized.TestCase):
  def test_size(self):
    self.assertEqual(hlo_text.size('bf16[4,8]{1,0:T(8,128)}'), 64)
    self.assertEqual(hlo_text.size('(f32[3]{0}, s32[], pred[2,2], token[])'), 12 + 4 + 4)

  def test_loops_run_as_often_as_their_condition_says(self):
    trips = hlo.trips(TEXT)
    self.assertEqual((trips['main'], trips['body'], trips['pick']), (1, 5, 5))
    known = TEXT.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    self.assertEqual(hlo.trips(known)['body'], 7)
    self.assertEqual(hlo.unknown_loops(TEXT), [])
    unbounded = TEXT.replace('constant(5)', 'iota()')
    self.assertEqual(hlo.trips(unbounded, unknown=3)['body'], 3)
    self.assertEqual(hlo.unknown_loops(unbounded), ['loop'])

  @parameterized.parameters(
    ((), 4),  # 1, 3, 5, 7.
    ((('%first = u32[]{:T(128)} constant(1)', '%first = u32[]{:T(128)} constant(2)'),), 3),
    ((('u32[]', 's64[]'),), 4),
    ((('constant(2)', 'constant(3)'),), 3),
    ((('direction=LT', 'direction=LE'), ('constant(8)', 'constant(7)')), 4),
    ((('compare(%n.4, %limit.1), direction=LT', 'compare(%limit.1, %n.4), direction=GT'),), 4),
    (
      (
        ('add(%p.2, %q)', 'subtract(%p.2, %q)'),
        ('direction=LT', 'direction=GT'),
        ('u32[]{:T(128)} constant(1)', 'u32[]{:T(128)} constant(9)'),
        ('constant(8)', 'constant(0)'),
      ),
      5,
    ),  # 9, 7, 5, 3, 1.
  )
  def test_counter_that_steps(self, changes, wanted):
    """A counter of another width, direction or start is read too, also through a fusion."""
    text = TEXT
    for old, new in changes:
      self.assertIn(old, text)
      text = text.replace(old, new)
    self.assertEqual(hlo.trips(text, unknown=100)['window_body'], wanted)

  def test_counter_that_does_not_lead_to_the_bound(self):
    endless = TEXT.replace('add(%p.2, %q)', 'subtract(%p.2, %q)')
    self.assertEqual(hlo.unknown_loops(endless), ['window'])

  def test_collectives(self):
    """Counts what five passes gather and scatter, a pair sums, and four passes send.

    Each of the five passes gathers 64 values among four chips and scatters as many. The pair sums
    32 floats, and each of the four passes sends six floats.
    """
    self.assertEqual(
      hlo.collectives(TEXT, 8),
      {
        'all-gather': 5 * 128 * 3 / 4,
        'reduce-scatter': 5 * 128 * 3 / 4,
        'all-reduce': 2 * 128 / 2,
        'all-to-all': 0.0,
        'collective-permute': 128.0 + 4 * 24,
      },
    )

  def test_memory(self):
    """Counts only the row that a fusion slices from its operand, not the whole table."""
    row, gather, scatter, rest = 2 * 64 + 4, 32 + 128, 128 + 32, 4 * 128
    add, compare = 3 * 4, 4 + 4 + 1
    copied, sent = 2 * 4, 2 * 24
    window = add + copied + sent + compare
    self.assertEqual(
      hlo.memory_traffic(TEXT), 5 * (row + gather + scatter + add + compare) + 4 * window + rest
    )

  def test_a_compiled_loop(self):
    def function(x, w_EDD):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_EDD)[0]

    shapes = jnp.zeros((4, 64)), jnp.zeros((6, 64, 64))
    text = jax.jit(function).lower(*shapes).compile().as_text()
    self.assertEqual(max(hlo.trips(text).values()), 6)
    weights = 6 * 64 * 64 * 4
    self.assertBetween(hlo.memory_traffic(text), weights, 4 * weights)
    self.assertEqual(sum(hlo.collectives(text, 1).values()), 0.0)

  def test_a_compiled_loop_whose_count_is_not_written_down(self):
    def function(x, w_EDD):
      def more(state):
        return (state[0] < 9) & (state[1].sum() < 100.0)

      def step(state):
        return state[0] + 2, jnp.tanh(state[1] @ w_EDD[state[0] // 2])

      x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_EDD)[0]
      return jax.lax.while_loop(more, step, (0, x))[1]

    shapes = jnp.zeros((4, 64)), jnp.zeros((6, 64, 64))
    text = re.sub(
      r'"known_trip_count":\{"n":"\d+"\},?',
      '',
      jax.jit(function).lower(*shapes).compile().as_text(),
    )
    self.assertNotIn('known_trip_count', text)
    self.assertEqual(hlo.unknown_loops(text), [])
    self.assertContainsSubset({5.0, 6.0}, hlo.trips(text, unknown=100).values())


if __name__ == '__main__':
  absltest.main()
