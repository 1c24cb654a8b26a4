"""What the harness costs, each time against a bare lower bound or against what one would take instead.

A benchmark is a module here that gives `run(tiny) -> list[Row]`; the folder is the registry. `python -m bench` runs them all, each in a process of
its own, and writes `bench/results/`; `python -m bench.document` turns that into docs/benchmarks.md.
"""
