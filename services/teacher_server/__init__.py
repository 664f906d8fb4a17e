"""The teacher service: exact log-probs of student-chosen tokens, over a Redis queue, gRPC and HTTP."""
