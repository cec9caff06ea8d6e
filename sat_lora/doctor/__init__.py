"""The doctor: why a backward pass hangs, or why nothing learns. docs/doctor.md explains every code that it gives.

before a run    before_run     everything, from a run's options; examination: of any model with adapters, on hooks alone
                checks         trained_set, gradients, reachability, checkpointing, parallelism, values, optimization,
                               configuration, data, memory_report, environment (packages, space, collectives)
                estimate       memory of any size at any layout, on tensors without memory; memory: the formulas
during a run    trace          writes each rank's rank_files as it goes; watchdog: ends a run that hangs
after a hang    testimony      stacks, and flight_record: collectives, that the ranks leave when the watchdog ends them
                verdict        from evidence (rank_state and the rest): who stopped where, told by paragraph; timeline
                replay         runs the step again on gloo ranks
in all          findings       what a check has found, with the codes of codes
"""
