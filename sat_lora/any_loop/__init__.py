"""Tools for training loops that are not ours: a plain loop of torch, one around DeepSpeed's engine, SAT's own trainer.

They take a model, or the engine around it, and need neither our settings nor a run folder. The loop of
`sat_lora.training` uses what they are made of: the trace and its watchdog, the checks of the doctor.
"""
