"""Alarms: known ways for a run to go wrong, told while it trains, each with its numbers and the paper's remedy.

A rule is a pure function of the history of metrics (`overlap.py`, `entropy.py`, `gradients.py`, `lengths.py`,
`scores.py`), one row of the table in `rules.py` with its remedy. `watch.py` says what begins and what ends at a step,
`desk.py` tells everybody and acts. A metric that a run does not have keeps the rules that need it silent.
"""
