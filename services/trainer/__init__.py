"""The trainer service: samples rollouts, has them scored, updates the student. `loop.py` is the algorithm."""
