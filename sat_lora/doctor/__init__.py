"""Why a backward hangs, or why nothing learns: checks before a run, a watchdog in it, a verdict after it.

Each check gives `Finding`s (`findings`), whose codes and meanings are in `codes` and docs/doctor.md.
"""
