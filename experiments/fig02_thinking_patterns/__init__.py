"""One figure of the paper; see README.md."""
