"""Checkpoints that are whole or not there, and are checked before they are used.

    checkpoints/
      step-00000300/
        weights.safetensors     fp32 weights by parameter name
        optimizer.safetensors   AdamW's moments, "exp_avg/<parameter>" and "exp_avg_sq/<parameter>"
        state.json              step, position in the data, random state, the model's shape, the configuration
        manifest.json           size and SHA-256 of each file
      latest                    name of the newest folder

A checkpoint is written into a folder of another name, synced to disk, and renamed: a crash or a full disk leaves the
ones before it as they were. Tensors are whole whatever engine wrote them, and pass through memory one by one. Loaders
of safetensors return flipped bits without a word, so every file is compared with the manifest first.
"""
