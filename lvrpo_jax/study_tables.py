"""Former place of `lvrpo_jax.reports.study_tables`, kept for one release: the command goes on there."""

from lvrpo_jax.reports import study_tables

if __name__ == '__main__':
  study_tables.main()
