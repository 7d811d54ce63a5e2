"""Databases for users' tests."""
