"""How long OpenMP's threads stay awake for the next parallel loop: imported before PyTorch, whose libgomp reads it once.

Its own choice is milliseconds. On two cores and beside one other busy process, steps then take more than twice as long as with
threads that sleep: who waits keeps the one it waits for from running. This is long enough for what lies between most loops of
a step. A value from the environment is left alone; in a process that has loaded PyTorch before, libgomp's stays.
"""

import os

SPIN_COUNT = 1000  # about 15 us

os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
