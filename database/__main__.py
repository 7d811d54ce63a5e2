"""`python -m database`: the command-line tool."""

import sys

from database.cli import main

if __name__ == "__main__":
    sys.exit(main())
