"""The processes of the service: server, workers, agent."""
