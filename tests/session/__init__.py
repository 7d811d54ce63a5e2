"""What a task holds."""
