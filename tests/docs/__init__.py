"""The documentation is true, complete and readable."""
