"""What a step takes of each GPU, of its host and of time, before it runs, and what of that is useful.

hardware: GPUs and what they could do. operations: the useful ones of a step. lasting: what engines hold whatever the
length. sizes: what an estimate asks of a model and a rank's tokens. own: that of the recipe's own model. counting,
folder: that of one of Transformers. exchanged: weights and gradients between ranks. seconds: how long devices and links
work. step: all of it together. fitting: a run that cannot fit, and what would.
"""
