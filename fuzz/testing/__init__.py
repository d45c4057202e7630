"""Kernel tests: what `@kernel_test` makes of a function, in pytest or without it.

A kernel test is a Hypothesis test (`decorator`) whose cases are run as a campaign runs them (`run`): by workers
(`source` tells them where the function is), on guarded buffers, against an oracle. `fuzz/pytest_plugin.py` adds the
options, devices (`devices`) and reports (`report`).
"""
