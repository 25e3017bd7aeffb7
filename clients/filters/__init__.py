"""The filters that decide which synthetic samples a device keeps: by name, in a configured order, in one pass.

The three filters of CDCDA-PLM (arXiv 2508.21313): semantic consistency, diversity, length. Beside them adversarial
validation, self-consistency, and a person's review. Another is a plug-in's, under a name that `filters.order` then may
list (`docs/extending.md`).
"""

from untether.clients.filters.beside import Beside
from untether.clients.filters.case import Case, Examination, Filter, Finding, Fixed, text_of
from untether.clients.filters.judging import create_filters, judge

__all__ = ["Beside", "Case", "Examination", "Filter", "Finding", "Fixed", "create_filters", "judge", "text_of"]
