"""The operations store's schema: as it is now (`tables`), and how it came to be (`versions`, run by Alembic)."""
