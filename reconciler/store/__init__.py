"""Durable desired state: one implementation over SQLAlchemy Core, one writer thread with group commit, Alembic migrations."""
