"""The paper's figures at testbed scale: one folder per figure, run by `opd experiment run NAME`.

Reading order: `arms.py` (what is trained), `experiment.py` (what a figure is made of), `claims.py` (how a claim is
judged), `running.py` (how it is run), then any `fig*/experiment.py`.
"""
