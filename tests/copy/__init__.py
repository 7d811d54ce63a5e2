"""Moving house."""
