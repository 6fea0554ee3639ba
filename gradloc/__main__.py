"""``python -m gradloc`` is the command line."""

import sys

from gradloc.cli.main import main

sys.exit(main())
