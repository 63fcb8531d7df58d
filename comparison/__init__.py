"""Finished runs side by side: what `compare_architectures.py` is made of, and its interface for other commands.

    from comparison import compare, group_runs, load_runs, table, write_html, write_markdown
    comparison = compare(group_runs(load_runs(["out/a", "out/b"])), baseline=None)
    print(table(comparison))

runs.py: logs → RunSummary, resumed chains joined; inference.py: error bars and tests; groups.py: repeated seeds, what
is comparable, the comparison; report.py: table, Markdown, CSV, JSON; pictures.py: PNG and the HTML page.
"""

from comparison.groups import Comparison, Group, NotComparable, compare, default_metric, group_runs
from comparison.pictures import write_html, write_plot
from comparison.report import table, write_csv, write_json, write_markdown
from comparison.runs import RunSummary, load_runs

__all__ = [
    "Comparison",
    "Group",
    "NotComparable",
    "RunSummary",
    "compare",
    "default_metric",
    "group_runs",
    "load_runs",
    "table",
    "write_csv",
    "write_html",
    "write_json",
    "write_markdown",
    "write_plot",
]
