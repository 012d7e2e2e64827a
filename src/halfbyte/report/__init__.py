"""What a run came to, to look at: pages that need nothing else, and their pictures."""

from halfbyte.report.html import page, table, text
from halfbyte.report.run import Answer, RunReport, Shown
from halfbyte.report.run_page import run_page

__all__ = ["Answer", "RunReport", "Shown", "page", "run_page", "table", "text"]
