"""What a run is made from: data, model files, optimizer, plan, the test of isolation."""
