"""What a finished run looks like to people: one self-contained report.html, figures and tables for a paper."""

from __future__ import annotations

from sim.report.html import write_report

__all__ = ["write_report"]
