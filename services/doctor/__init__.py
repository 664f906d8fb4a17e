"""`opd doctor`: looks an installation over and says what to mend. Loads no torch.

It changes nothing that is there. Rights in Redis are tried on keys of its own that are gone within a second, and
`--score` submits one request of two tokens to each pool and address, which counts as any other request does.
"""
