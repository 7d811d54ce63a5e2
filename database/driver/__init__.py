"""The driver: connections on worker threads, lanes, leases and the pool. It knows no database by name.

Nothing is re-exported: its users are this package's own modules, and they name the module they mean.
"""
