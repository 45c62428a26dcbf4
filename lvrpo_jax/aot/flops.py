"""Counts the arithmetic of a traced program: multiplications and additions, loops unrolled.

XLA's cost analysis counts the body of a loop once and sees nothing inside a Pallas kernel.
"""

from __future__ import annotations

import math
from typing import Any, cast

from jax import core as jax_core
from jax.extend import core


def count(jaxpr: core.Jaxpr, unknown: int = 1) -> float:
  """Counts multiplications and additions of all products and convolutions, over all devices.

  Args:
    jaxpr: the traced program.
    unknown: passes assumed for a `while` loop, whose number a traced program does not hold.
  """
  return sum(_equation(eqn, unknown) for eqn in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn, unknown: int) -> float:
  """Counts one equation, with the programs inside it."""
  name, params = eqn.primitive.name, eqn.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    inner = math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
    return 2.0 * math.prod(_shape(eqn.outvars[0])) * inner
  if name == 'conv_general_dilated':
    kernel, spec = _shape(eqn.invars[1]), params['dimension_numbers'].rhs_spec
    return 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) / kernel[spec[0]]
  inner = [count(sub, unknown) for sub in _inside(params)]
  if not inner:
    return 0.0
  if name == 'scan':
    return params['length'] * inner[0]
  if name == 'while':
    return unknown * sum(inner)
  if name == 'cond':
    return max(inner)
  if name == 'pallas_call':
    return math.prod(params['grid_mapping'].grid) * sum(inner)
  if name == 'shard_map':
    return params['mesh'].size * sum(inner)
  return sum(inner)


def _shape(value: core.Var | core.Literal) -> tuple[int, ...]:
  return cast(jax_core.ShapedArray, value.aval).shape


def _inside(params: dict[str, Any]) -> list[core.Jaxpr]:
  """Returns the programs inside an equation, by the equation's parameters."""
  out = []
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        out.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        out.append(item)
  return out
