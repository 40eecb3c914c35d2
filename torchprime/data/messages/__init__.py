"""Messages in the forms of many trainers, read into one form: role, content, calls, loss."""
