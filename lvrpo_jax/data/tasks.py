"""Names of the tasks."""

from __future__ import annotations

GENERATE, UNDERSTAND, EDIT, THINK_GENERATE = 'generate', 'understand', 'edit', 'think_generate'


TASKS = (GENERATE, UNDERSTAND, EDIT, THINK_GENERATE)


PLAN = 'plan'
"""The text half of `THINK` where both halves of a trajectory stand side by side."""


TEXT_OUTPUTS = (UNDERSTAND, PLAN)
"""Outputs that are texts; all others are images."""
