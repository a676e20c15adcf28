"""Answer a file of rows with a published version: `ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/predict.py NAME@VERSION rows.npz answers/`."""

import sys

from portaisys.serve.predict import main

sys.exit(main())
