"""The two services and their command. Each service is loaded only by the subcommand that runs it."""
