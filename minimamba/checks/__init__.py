"""Exercises that know what you did wrong. One module per chapter:

from minimamba.checks import discretization as check
check.zoh(my_zoh)      # one line if it is right, else CheckFailed, which says what is wrong and where to read
check.hint("zoh")      # three hints, the next one with each call; check.picture("zoh", my_zoh) draws both
"""

from minimamba.checks._core import CheckFailed

__all__ = ["CheckFailed"]
