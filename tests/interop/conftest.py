import sys
from pathlib import Path

for _folder in ("paging", "machine"):
    sys.path.insert(0, str(Path(__file__).parent.parent / _folder))
