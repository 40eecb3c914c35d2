"""Terms of the objective that hold the weights or the answers near the base's."""
