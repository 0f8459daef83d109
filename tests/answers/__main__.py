"""Write minimamba/checks/TABLE.md, or one module's rows: python -m tests.answers [discretization ...]"""

import sys
from pathlib import Path

from .table import MODULES, TABLE, measure, read_rows, write

if __name__ == "__main__":
    names = sys.argv[1:] or MODULES
    rows = read_rows() | {name: measure(name) for name in names}
    write(rows)
    print(Path(TABLE).read_text())
