"""One step: engine, loss, gradients that are not finite, and the state to resume from."""
