"""A reference MLOps workflow for churn prediction that closes its loop."""
