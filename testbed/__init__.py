"""Model families small enough for a laptop, with the task, tokenizer and training that make them.

Everything here is seeded and synthetic: multi-step arithmetic with a verifiable integer answer, solved step by step in
one of two styles, with a systematic fault (the forgotten carry) in the demonstrations that base models learn from.
"""
