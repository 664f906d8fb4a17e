"""`opd preflight`: what can be known of a student and its teachers before any training is paid for.

`measuring.py` samples and scores, `gradient.py` looks at one batch, `pilots.py` trains for a few steps where asked to;
`rules.py` turns numbers into verdicts and ranks, and is pure; `findings.py` and `page.py` show what was found.
"""
