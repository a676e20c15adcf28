"""Search a space on Ray: `ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/tune.py tune_spaces/X.yaml [section.key=value ...]`."""

import sys

from portaisys.cli import main

sys.exit(main(["tune", *sys.argv[1:]]))
