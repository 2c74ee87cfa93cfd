"""Print the seconds and the peak memory in MB of a command: `timer.py COMMAND ...`. Without POSIX, the memory is nan.

It is a small process of its own, because Linux lets a new process inherit the peak memory of its parent.
"""

import os
import subprocess
import sys
import time

if __name__ == "__main__":
    start = time.perf_counter()
    status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
    seconds, peak = time.perf_counter() - start, float("nan")
    if os.name == "posix":
        import resource  # exists on POSIX only

        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        peak *= (1 if sys.platform == "darwin" else 1024) / 1e6
    print(seconds, peak)
    sys.exit(status)
