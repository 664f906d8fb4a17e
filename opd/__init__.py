"""Shared library of the OPD services: the data contract, the wire, the queue and the public client.

Light by rule: importing anything here, `opd.ops` excepted, loads no torch, transformers, vllm or fastapi.
"""

__version__ = "0.1.0"
