"""The public contract, held on every engine and every event loop."""
