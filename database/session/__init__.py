"""What a task holds: the handle of a database, transactions, streams, decorated functions."""
