"""What a step takes of each GPU, of its host and of time, before it runs, and what of that is useful.

hardware: GPUs and what they could do. operations: the useful ones of a step. sizes: of a model and a rank's tokens, in
bytes. lasting: what engines hold whatever the length. seconds: how long the device works. step: all of it together.
fitting: a run that cannot fit, and what would.
"""
