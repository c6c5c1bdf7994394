"""Reports to look at: one self-contained page, and small tables for notebooks.

Everything here takes plain values (what ``to_dict`` returns), so that any floor above may use it.
"""

from moeopt.html.numbers import ratio
from moeopt.html.page import check_target, write_page
from moeopt.html.tables import certificate_table, inspection_table, load_table, loss_table, report_table

__all__ = [
    "certificate_table",
    "check_target",
    "inspection_table",
    "load_table",
    "loss_table",
    "ratio",
    "report_table",
    "write_page",
]
