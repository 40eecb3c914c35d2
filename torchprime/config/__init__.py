"""From YAML and a command line to one checked, frozen `TrainConfig`; no torch is imported here."""
