"""Chat templates: which one renders, what it renders, where in it the model speaks."""
