"""The training recipe: model, data, engines and the loop that `launch/train.py` runs."""
