"""What a run came to, to look at: pages that need nothing else, and their pictures."""

from halfbyte.report.dashboard import LOOPBACK, Dashboard
from halfbyte.report.html import page, table, text
from halfbyte.report.run import Answer, RunReport, Shown
from halfbyte.report.run_page import run_page

__all__ = ["LOOPBACK", "Answer", "Dashboard", "RunReport", "Shown", "page", "run_page", "table", "text"]
