"""`python -m launch` is `dino-scale`."""

import sys

from launch.cli import main

sys.exit(main())
