"""The first tables: meta, hosts, environments, VMs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "meta",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "hosts",
        sa.Column("addr", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, nullable=True, unique=True),
        sa.Column("registered_at", sa.BigInteger, nullable=False),
        sa.Column("cordoned", sa.Boolean, nullable=False),
    )
    op.create_table(
        "envs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("power", sa.Text, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("rolled", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("deleting", sa.Boolean, nullable=False),
    )
    op.create_table(
        "vms",
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


def downgrade() -> None:
    for table in ("vms", "envs", "hosts", "meta"):
        op.drop_table(table)
