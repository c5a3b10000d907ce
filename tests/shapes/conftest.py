"""The example scripts and this folder's helper are plain modules, not packages: their folders join sys.path here."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples" / "shapes")]
