"""What an engine fills in: read `contract` to add one."""
