"""Nothing lost, nothing leaked, nothing hung: the package under attack."""
