"""Run checkpoints: storage, shards, manifest, retention and the lock of a run's folder."""
