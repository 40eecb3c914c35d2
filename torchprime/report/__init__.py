"""A run's folder becomes report.md and report.html."""
