"""How fast this package is, beside raw ``sqlite3`` and beside its neighbours.

``python -m tests.benchmarks --help`` lists what can be asked for. One run takes every contender in turn,
round by round, on a fresh copy of one seeded database file, checks every answer and the final row counts, and
reports medians. A contender that answers wrongly or fails is reported as such and never as a figure.

=================  ==================================================================================
``store.py``       the database file: schema, statements, seeding, verification
``contenders.py``  raw ``sqlite3`` and this package; what a contender is
``neighbours.py``  the other asynchronous libraries, as documented and in their fastest form
``workloads.py``   what is measured, and how
``cold.py``        import time and the first query of a new process
``growth.py``      how cost grows with tasks, rows, readers and result size
``goals.py``       what is wanted of each workload, as data
``runner.py``      rounds, event loops, results
``report.py``      Markdown and JSON
``charts.py``      SVG
``compare.py``     a command of its own: two checkouts of this package against one another
``compared.py``    what that starts: one checkout at one workload
=================  ==================================================================================
"""
