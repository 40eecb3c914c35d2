"""Run checkpoints: storage, shards, manifest, retention, the lock of a folder."""
