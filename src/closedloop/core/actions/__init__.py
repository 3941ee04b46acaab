"""Campaigns: who gets an offer and who is left alone, what the offers did, and what is left to judge a model by."""
