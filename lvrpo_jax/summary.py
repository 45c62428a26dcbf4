"""Former place of `lvrpo_jax.reports.summary`, kept for one release: the command goes on there."""

import sys

from lvrpo_jax.reports import summary

if __name__ == '__main__':
  sys.exit(summary.main())
