"""The suite `tuned`: the paper's tuned configurations at their own sizes."""
