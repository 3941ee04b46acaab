"""How a release moves, and on what evidence."""
