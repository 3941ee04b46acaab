"""The prediction log: spools beside the workers, drained into the operations store."""
