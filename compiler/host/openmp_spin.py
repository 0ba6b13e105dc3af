"""The OpenMP spin count: how long a thread spins for the next parallel loop before it sleeps.

Import this before PyTorch, whose libgomp reads GOMP_SPINCOUNT once, when it is loaded. libgomp's default is
milliseconds: on two cores beside one other busy process, steps then take more than twice as long as with threads that
sleep, because a spinning thread keeps the thread it waits for from its CPU. The count here covers what lies between
most loops of a step. A value from the environment is left alone.
"""

import os

SPIN_COUNT = 1000  # about 15 us

os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
