"""From options and a DeepSpeed file to what a run is told."""
