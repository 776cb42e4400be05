"""What is kept of a model's blocks for the backward pass, and where: on the device, in host memory, or not at all.

blocks: runs each block as its placement says. host: memory of the host, and what moves there and back. plan: which
block has which placement. rounds: blocks of a sequence that one device has alone, some queries at a time. rows: the
parts of a block that look at one token at a time, in tiles of tokens.
"""
