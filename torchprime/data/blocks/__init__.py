"""Examples become batches: stored, mixed, packed into blocks and ordered."""
