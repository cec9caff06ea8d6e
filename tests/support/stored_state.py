"""What state.json of a checkpoint holds."""

from sat_lora.training.steps.random_state import random_state


def stored_state(**changes) -> dict:
    """That of step 4 of a run on one rank, with changes."""
    state = dict(step=4, skipped=1, best_loss=2.5, best_step=2, good_step=2, owes_validation=False, steps_taken=3)
    state |= dict(best_value=None, not_better=1)
    state |= dict(samples_per_step=8, layout=[1, 1], loss_scale={"cur_scale": 1024.0}, random=[random_state()], run={})
    return {**state, **changes}
