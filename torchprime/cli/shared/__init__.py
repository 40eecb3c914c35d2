"""What several commands use: arguments, output columns, prepared data."""
