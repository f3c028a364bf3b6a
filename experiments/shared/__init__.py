"""Code that several experiments share. Nothing here is run by itself.

recipes.py           recipes and options of the video experiments, as data
building.py          the network and the trainer of a recipe
video_training.py    training on a list of videos
multi_view.py        testing on a list of videos, with one view and with many
fingerprints.py      what the scores of a test depend on
video_experiment.py  a whole video experiment: lists, training, testing
results.py           result files, result tables and learning curves
toy_results.py       the table and the picture of the toy videos
command_line.py      options in groups, commands as they are recorded, text as it is printed
"""
