"""Train, and nothing after it: `ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/train.py jobs/specs/digits.yaml [section.key=value ...]`."""

import sys

from portaisys.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
