"""The report of a run's folder: report.md and report.html."""
