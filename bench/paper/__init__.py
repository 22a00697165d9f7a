"""The suite `paper`: the experiments of the paper, beside its own numbers."""
