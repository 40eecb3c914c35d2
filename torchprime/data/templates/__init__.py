"""Chat templates: choice, rendering, and the assistant's spans in the rendered text."""
