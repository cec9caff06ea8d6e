"""Where the checkout, its demo and this interpreter's programs lie."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "finetune_demo"
TINY_BASE = DEMO / "tiny_cogvlm"
BIN = Path(sys.executable).parent
