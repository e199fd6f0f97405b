"""The example's own modules are imported here as `python examples/train_gpt.py` imports them: by their plain names."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))
