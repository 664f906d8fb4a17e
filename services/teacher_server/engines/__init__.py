"""Engines that compute log-probs; `base.py` is all that the rest of the service knows of them."""
