"""JSON Schema checked exactly and in bounded time."""
