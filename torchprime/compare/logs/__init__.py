"""The logs of a run, whoever wrote them, become one form."""
