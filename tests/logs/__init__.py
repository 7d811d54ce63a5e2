"""What becomes of log records."""
