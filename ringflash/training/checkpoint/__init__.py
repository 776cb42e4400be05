"""Checkpoints that are whole or not there, are checked before they are used, and are written while training goes on.

    checkpoints/
      step-00000300/
        weights-00000.safetensors     what rank 0 wrote of the fp32 weights, by parameter name
        optimizer-00000.safetensors   and of AdamW's moments, "exp_avg/<parameter>" and "exp_avg_sq/<parameter>"
        weights-00001.safetensors     what rank 1 wrote ...
        state.json                    step, position in the data, random state, the model's shape, the configuration
        manifest.json                 size and SHA-256 of each file
      latest                          name of the newest folder

Each rank writes the elements that it holds, and reads those that it needs, whoever wrote them: engine and number of
ranks do not matter. A checkpoint is written into a folder of another name, synced to disk, and renamed once all ranks
are done: a crash or a full disk leaves the ones before it as they were. Loaders of safetensors return flipped bits
without a word, so every file is compared with the manifest first.

Files are as torch.distributed.checkpoint writes and reads them (`HuggingFaceStorageReader`), of flattened tensors. It
does not write them itself: it knows rectangles of tensors only, where ZeRO cuts at any element, talks to other ranks
while it writes, which would get in the way of a step's collectives, and neither hashes nor renames.
"""
