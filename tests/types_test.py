"""Tests of the records: names of fields follow the axis legend, and records are frozen trees."""

import dataclasses
import inspect
import re

from absl.testing import absltest
from absl.testing import parameterized
from flax import struct
import jax
from jax import numpy as jnp

from lvrpo_jax import types

RECORDS = {
  name: record
  for name, record in vars(types).items()
  if inspect.isclass(record) and issubclass(record, struct.PyTreeNode)
}
LEGEND = set(re.findall(r'(?:^| ) ([A-Z])  \S', inspect.getdoc(types), re.MULTILINE)) | {'M'}
SCALARS = {'step', 'temperature', 'drift', 'guidance'}
"""Arrays without an axis."""


class RecordsTest(parameterized.TestCase):
  def test_legend_is_read(self):
    self.assertEqual(LEGEND, set('BGRLSUNDHJKFVTCPYXE') | {'M'})
    self.assertGreater(len(RECORDS), 15)

  @parameterized.parameters(*RECORDS)
  def test_arrays_are_named_by_their_axes(self, name):
    """`losses.split_group` finds the axis of samples by the suffix."""
    for field in dataclasses.fields(RECORDS[name]):
      if field.type == 'Array':
        _, _, axes = field.name.rpartition('_')
        self.assertTrue(field.name in SCALARS or set(axes) <= LEGEND, field.name)

  @parameterized.parameters(*RECORDS)
  def test_records_are_frozen_trees(self, name):
    fields = [field.name for field in dataclasses.fields(RECORDS[name])]
    record = RECORDS[name](**{field: float(number) for number, field in enumerate(fields)})
    self.assertEqual(jax.tree.leaves(record), [float(number) for number in range(len(fields))])
    with self.assertRaises(dataclasses.FrozenInstanceError):
      setattr(record, fields[0], None)

  def test_a_guided_query_is_a_query(self):
    query = types.FlowQuery(
      prompts=None, x_BKGNC=jnp.zeros((1, 2, 3, 4, 5)), time_BKG=jnp.zeros((1, 2, 3))
    )
    guided = types.GuidedFlowQuery(**vars(query), scale_BKG=jnp.ones((1, 2, 3)))
    self.assertIsInstance(guided, types.FlowQuery)
    self.assertLen(jax.tree.leaves(guided), 3)


if __name__ == '__main__':
  absltest.main()
