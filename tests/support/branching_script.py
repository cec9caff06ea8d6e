"""finetune_cogvlm.py as someone runs it whose CogVLM branches on the data, as the published code does."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In place of this folder, whose modules are nobody's but the tests' (`datasets` is a library too).
sys.path[:1] = [str(ROOT), str(ROOT / "finetune_demo")]

if __name__ == "__main__":
    import finetune_cogvlm

    from tests.support.branching_cogvlm import branch_on_data

    branch_on_data()
    sys.exit(finetune_cogvlm.main())
