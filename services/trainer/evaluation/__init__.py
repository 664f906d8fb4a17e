"""Evaluation of a model on problems with known answers: sampling, grading, estimates."""
