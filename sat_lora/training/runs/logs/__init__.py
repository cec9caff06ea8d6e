"""Where the figures of a run go beside its folder: json lines, pictures of the loss, TensorBoard, W&B."""
