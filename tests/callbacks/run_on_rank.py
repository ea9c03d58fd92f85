"""Run a function on one rank: ``run_on_rank.py FUNCTION RANK RESULT``, with files of pickles."""

import os
import pickle
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
function, rank, result = sys.argv[1:]
try:
    returned = pickle.loads(Path(function).read_bytes())(int(rank))
except BaseException as error:
    traceback.print_exc()
    returned = f"{type(error).__name__}: {error}"
Path(result).write_bytes(pickle.dumps(returned))
sys.stderr.flush()
os._exit(0)  # without waiting for the other ranks
