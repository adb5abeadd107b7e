"""The tables. Changed only together with a migration; a test compares the two."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

hosts = sa.Table(
    "hosts",
    metadata,
    sa.Column("addr", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, nullable=True, unique=True),
    sa.Column("registered_at", sa.BigInteger, nullable=False),
    sa.Column("cordoned", sa.Boolean, nullable=False),
    sa.Column("drain_total", sa.BigInteger, nullable=True),
)

envs = sa.Table(
    "envs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("power", sa.Text, nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("rolled", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=False),
    sa.Column("deleting", sa.Boolean, nullable=False),
)

vms = sa.Table(
    "vms",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("env_id", sa.Text, nullable=False, index=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("spec_hash", sa.Text, nullable=False),
    sa.Column("desired", sa.Text, nullable=False),
    sa.Column("host_id", sa.Text, nullable=True),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("gone_at", sa.BigInteger, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("env", sa.Text, nullable=False),
    sa.Column("vm", sa.Text, nullable=False),
    sa.Column("vm_name", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("first_seen", sa.BigInteger, nullable=False),
    sa.Column("last_seen", sa.BigInteger, nullable=False),
)
