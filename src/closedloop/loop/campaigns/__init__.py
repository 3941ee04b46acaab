"""Campaigns: the list of customers to call, and what came of it."""
