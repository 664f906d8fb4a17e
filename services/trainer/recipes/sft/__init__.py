"""Supervised fine-tuning of a student on responses it did not sample: the second half of a cold start (5.1, C.1)."""
