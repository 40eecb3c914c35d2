"""Arrow types become the values that JSON would have."""
