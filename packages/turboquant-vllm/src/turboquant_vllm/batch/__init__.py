"""What one batch looks like."""
