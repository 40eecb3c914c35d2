"""What happens around the steps besides the steps."""
