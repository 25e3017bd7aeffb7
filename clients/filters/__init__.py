"""Which synthetic samples a device keeps: named filters in a configured order, and one pass that applies them.

The three filters of CDCDA-PLM (arXiv 2508.21313): semantic consistency, diversity, length. Another (adversarial
validation, a person's review) is a factory registered under a name that `filters.order` then may list.
"""

from untether.clients.filters.case import Case, Examination, Filter, Finding, text_of
from untether.clients.filters.judging import judge
from untether.clients.filters.registry import create, known, register

__all__ = ["Case", "Examination", "Filter", "Finding", "create", "judge", "known", "register", "text_of"]
