"""What all programs share: command line, frame, files, statistics and tables."""

import sys
from pathlib import Path

# The checkout this lies in, so that the examples run without installing the package.
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
