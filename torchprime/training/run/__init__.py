"""A run's folder: what is written there, resumed from it and exported."""
