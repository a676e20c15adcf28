"""Run a whole spec on Ray: `ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/run.py jobs/specs/digits.yaml [section.key=value ...]`."""

import sys

from portaisys.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
