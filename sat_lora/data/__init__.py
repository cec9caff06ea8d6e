"""Paths become samples: files of samples, folders of pictures, and what is named instead of being learnt."""
