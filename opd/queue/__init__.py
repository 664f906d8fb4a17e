"""The durable queue between trainers and a teacher pool: the only part of the system that knows Redis.

`keys` names every key, `lua/` holds the protocol, `score_client` is the trainer's side, `score_consumer` the
replica's. Bodies and replies are opaque bytes here. Why it is built this way: docs/decisions/0001-queue-protocol.md.
"""
