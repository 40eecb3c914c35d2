"""The parts of a run: data, model files, optimizer, plan, the test of isolation."""
