"""The leak check: exact and near duplicates between held-out and training rows."""
