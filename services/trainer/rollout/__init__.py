"""Rollout engines: what samples responses from the student, behind one protocol."""
