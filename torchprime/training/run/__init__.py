"""The files of a run's folder: writing, resuming and exporting."""
