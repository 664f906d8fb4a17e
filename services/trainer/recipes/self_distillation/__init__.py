"""Teachers held by the trainer itself: the student's own initial weights, their moving average, or a model folder.

`settings.py` says which, `teacher.py` scores as a pool would, `moving_average.py` follows the student.
"""
