"""The filters that decide which synthetic samples a device keeps: by name, in a configured order, in one pass.

The three filters of CDCDA-PLM (arXiv 2508.21313): semantic consistency, diversity, length. Plug-ins can register others
(adversarial validation, a person's review) under names that `filters.order` may list (`docs/extending.md`).
"""

from untether.clients.filters.case import Case, Examination, Filter, Finding, Fixed, text_of
from untether.clients.filters.judging import create_filters, judge

__all__ = ["Case", "Examination", "Filter", "Finding", "Fixed", "create_filters", "judge", "text_of"]
