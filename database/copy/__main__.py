"""`python -m database.copy`."""

import sys

from database.copy.command import main

sys.exit(main())
