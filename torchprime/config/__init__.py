"""Composition and checks of a run's config: one frozen `TrainConfig`, made without torch."""
