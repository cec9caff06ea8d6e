"""What a run leaves behind while it goes, and the verdict when it hangs. It knows no training."""
