"""Lists of videos: what they contain (`records`) and how each format is parsed (`formats`)."""
