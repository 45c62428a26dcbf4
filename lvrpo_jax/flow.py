"""Rectified flow: interpolation, times, transitions, log-ratios and guidance.

All flow mathematics of the package is in this module. Convention: `x_t = (1 - t) x_0 + t noise`, so
t = 1 is noise and t = 0 is data. The velocity is `dx/dt = noise - x_0`, and sampling walks t from 1
to 0. All values are float32.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
from jax import numpy as jnp
import numpy as np

Array = jax.Array
Times = TypeVar('Times', jax.Array, np.ndarray)


def interpolate(x0: Array, noise: Array, t: Array) -> Array:
  """`(1 - t) x_0 + t noise` (Liu et al. 2022, arXiv 2209.03003); `t` broadcasts against both."""
  return (1 - t) * x0 + t * noise


def velocity_target(x0: Array, noise: Array) -> Array:
  """Returns `noise - x_0`, the derivative of `interpolate` with respect to t."""
  return noise - x0


def shift_time(u: Times, shift: float) -> Times:
  """Returns `s u / (1 + (s - 1) u)` (Esser et al., arXiv 2403.03206).

  A shift s > 1 spends more of the time near noise.
  """
  return shift * u / (1 + (shift - 1) * u)


def logit_normal_time(z: Array, shift: float) -> Array:
  """Maps a standard normal draw to a training time; z = -inf gives exactly 0 (clean latents)."""
  return shift_time(jax.nn.sigmoid(z), shift)


def time_grid(points: int, shift: float) -> Array:
  """Returns `points` times from 1 down to 0, for `points - 1` steps; both ends are exact."""
  # Computed in float64 on the host. In float32, some shifts start a rounding error below 1, where
  # the scale of a stochastic step is in the thousands.
  return jnp.asarray(shift_time(np.linspace(1.0, 0.0, points), shift), jnp.float32)


def ode_step(x: Array, v: Array, t: Array, t_next: Array) -> Array:
  """Takes one Euler step from t to t_next < t."""
  return x - v * (t - t_next)


class Transition(NamedTuple):
  """Gaussian of one step: `x_next = mean + std * z`.

  `std` is the deviation of the whole step, not per unit of time.
  """

  mean: Array
  std: Array


def sde_step(
  x: Array, v: Array, t: Array, t_next: Array, first_t: Array, eta: float | Array
) -> Transition:
  """Flow-GRPO's step (Liu et al. 2025, arXiv 2505.05470, eq. 9).

  It has the marginals of the ODE.

  Args:
    x, v: latents and velocity at t.
    t, t_next: times of the step.
    first_t: second point of the time grid; it replaces t = 1, where the scale is infinite.
    eta: noise level, the paper's `a`; 0 gives the Euler step.
  """
  dt = t_next - t
  safe_t = jnp.where(t >= 1.0, first_t, t)
  scale = eta * jnp.sqrt(t / (1 - safe_t))
  half = jnp.square(scale) / (2 * jnp.maximum(t, 1e-6))
  mean = x * (1 + half * dt) + v * (1 + half * (1 - t)) * dt
  return Transition(mean=mean, std=scale * jnp.sqrt(-dt))


def cps_step(
  x: Array, v: Array, t: Array, t_next: Array, first_t: Array, eta: float | Array
) -> Transition:
  """Coefficient-preserving step: noise is replaced, never added (arXiv 2509.05952).

  `eta` in [0, 1] sets `std = t_next sin(eta pi / 2)`; a step to t_next = 0 is therefore noise-free.
  """
  del first_t
  std = t_next * jnp.sin(eta * jnp.pi / 2)
  x0 = x - t * v
  x1 = x + (1 - t) * v
  mean = (1 - t_next) * x0 + jnp.sqrt(jnp.maximum(jnp.square(t_next) - jnp.square(std), 0.0)) * x1
  return Transition(mean=mean, std=std)


def dance_step(
  x: Array, v: Array, t: Array, t_next: Array, first_t: Array, eta: float | Array
) -> Transition:
  """DanceGRPO's step (arXiv 2505.07818): the noise per unit of time is the same at all times.

  `mean = x + v dt - eta^2/2 score dt`, `score = -(x - (1 - t) x0) / t^2`, `std = eta sqrt(-dt)`.
  """
  del first_t
  dt = t_next - t
  x0 = x - t * v
  score = -(x - (1 - t) * x0) / jnp.square(jnp.maximum(t, 1e-6))
  return Transition(mean=x + v * dt - 0.5 * eta**2 * score * dt, std=eta * jnp.sqrt(-dt))


STEPS = {'sde': sde_step, 'cps': cps_step, 'dance': dance_step}
"""Stochastic samplers by their config name; each takes the arguments of `sde_step`."""


def log_ratio(
  noise: Array, mean: Array, old_mean: Array, std: Array, axes: tuple[int, ...]
) -> Array:
  """Mean log-ratio per latent value of `N(mean, std)` to `N(old_mean, std)` at the sample.

  The sample is `old_mean + std * noise`, so the log-ratio is
  `mean(z d) / std - mean(d^2) / (2 std^2)` with `z = noise` and `d = mean - old_mean`. This form
  does not subtract two log-densities of order one, and equal means give exactly 0.

  Args:
    noise: standard normal draw of the sample.
    mean: mean under the policy in the numerator.
    old_mean: mean under the policy that sampled.
    std: deviation of both.
    axes: the axes of one sample, which are averaged (Flow-GRPO's convention).
  """
  d = mean - old_mean
  return jnp.mean(noise * d, axes) / std - jnp.mean(jnp.square(d), axes) / (2 * jnp.square(std))


def classifier_free(v: Array, v_empty: Array, scale: float | Array) -> Array:
  """Classifier-free guidance of a velocity (arXiv 2207.12598, eq. 6, with w = scale - 1).

  Args:
    v, v_empty: velocities with and without the text, of one shape.
    scale: 1 gives `v`, 0 gives `v_empty`.
  """
  return v_empty + scale * (v - v_empty)


def guide(
  v: Array,
  v_text: Array,
  v_image: Array,
  text_scale: float | Array,
  image_scale: float | Array,
  renorm: str,
  renorm_min: float,
) -> Array:
  """Classifier-free guidance with two branches and BAGEL's renormalisation.

  Args:
    v: velocity with the whole context, (..., N, C).
    v_text: velocity without the text.
    v_image: velocity without the images.
    text_scale, image_scale: 1 turns a branch off; image guidance alone has no effect.
    renorm: 'global' (norm over all axes), 'channel' (per token) or 'text_channel' (per token,
      before the image branch is mixed in).
    renorm_min: floor of the factor; 1 turns renormalisation off. The factor never exceeds 1.

  Raises:
    ValueError: `renorm` is unknown.
  """
  axes = tuple(range(v.ndim)) if renorm == 'global' else (-1,)

  def norm(y: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(y), axes, keepdims=True))

  def factor(y: Array) -> Array:
    return jnp.clip(norm(v) / (norm(y) + 1e-8), renorm_min, 1.0)

  def mix(y: Array) -> Array:
    return jnp.where(image_scale > 1, v_image + image_scale * (y - v_image), y)

  y = classifier_free(v, v_text, text_scale)
  if renorm == 'text_channel':
    out = mix(y * factor(y))
  elif renorm in ('global', 'channel'):
    z = mix(y)
    out = z * factor(z)
  else:
    raise ValueError(f"renorm is {renorm!r}; allowed: 'global', 'channel', 'text_channel'")
  return jnp.where(text_scale > 1, out, v)
