"""The doctor: why a backward pass hangs, or why nothing learns. docs/doctor.md explains every code that it gives.

diagnose        everything before a run, from its options: its model as it would be built, a step of each kind of batch
examine         of any model with adapters, by one pass on hooks alone
model_checks    what trains, what a gradient reaches, what is recomputed, what ranks share, values that are not finite
run_checks      packages, network and disks, configuration, data, optimizer and schedule
timeline        a picture of a backward pass that did not end

What runs leave behind, and the verdict on one that hung, lie in `sat_lora.watchdog`; the bytes of a step in
`sat_lora.memory`.
"""
