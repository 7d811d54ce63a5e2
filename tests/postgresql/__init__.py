"""PostgreSQL: what the contract does not say, and what must differ from it."""
