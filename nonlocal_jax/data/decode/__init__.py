"""Decoding of video files, step by step.

`container` opens a file, `timeline` finds out when each frame is shown, `seeking` decodes the
requested frames, and `conversion` makes RGB pixels of them. `nonlocal_jax.data.video` joins these.
"""
