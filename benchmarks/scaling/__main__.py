"""`python -m benchmarks.scaling > benchmarks/scaling.md`"""

from benchmarks.scaling.report import report

print("\n".join(report()))
