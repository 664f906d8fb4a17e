"""gRPC as clients and servers share it: errors to status codes and back, and the client of a teacher."""
