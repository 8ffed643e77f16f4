"""`splitwiser bench`: the experiments of *Splitwiser* (UT Austin) on whatever machine is there. See docs/bench.md."""
