"""One message of any trainer becomes one form: role, content, calls, loss."""
