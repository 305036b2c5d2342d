"""python -m lynceus.serve.edge FOLDER DEVICE: one device of a plan; see `lynceus.serve.edge.worker`."""

import sys

from lynceus.serve.edge.worker import main

sys.exit(main())
