"""Does vtok keep its word when things go wrong? `make soak` kills, interrupts, damages and starves it, and counts.

corpus.py     a small real corpus, a trained run, its export, a .vtok file: what everything here is done to
launch.py     commands of vtok in processes of their own, quickly started and killed with all their children
kills.py      SIGKILL at random moments, SIGUSR1 as a scheduler sends it: the end must be that of an unbroken run
crashes.py    a kill before every single operation on files, one after the other
damage.py     inputs that are changed, each with what must come of it, decided before it is read
readers.py    how each kind of input is read, and what came out of it
judge.py      what came of a changed input, in a process that may hang, crash or run out of memory
faults.py     a full disk, a folder that cannot be written, a clock that jumps, two runs in one place
__main__.py   the table
"""
